"""``conformance``: proves a destination against its server, with a fault proxy between the two."""

import asyncio
import shlex
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from consumer.commands import console
from consumer.config import Environment, Value
from consumer.errors import ConfigurationError
from consumer.telemetry import configure_logging
from consumer.testing.conformance import GRADES, Report, prove
from consumer.testing.conformance_cases import known_faults
from consumer.testing.conformance_disk import prove_on_disk
from consumer.testing.conformance_subject import Count, Options, Subject, count_by_command, count_by_url, resolve

START_SECONDS = 30.0
STOP_SECONDS = 5.0
_ADDRESS = "http://127.0.0.1:{port}/"


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asks for; ``{port}`` in the texts is the port of the server that is started."""

    spec: str
    url_setting: str | None = None
    server: str | None = None
    url: str | None = None
    count_command: str | None = None
    count_url: str | None = None
    plugins: Path | None = None
    path_setting: str | None = None


async def run_conformance(wish: Wish, options: Options, environment: Environment, *, as_json: bool) -> int:
    """Prove a destination and print its report; returns 1 unless all is well."""
    unknown = known_faults(options.only)
    if unknown:
        raise ConfigurationError(f"there is no fault {unknown[0]!r}; see consumer/testing/faults.py")
    configure_logging(level="INFO", style="auto", quiet=True)
    found = resolve(wish.spec, environment, wish.plugins)
    if wish.path_setting:
        subject = Subject(found, environment, options, url_setting=wish.path_setting)
        report = await prove_on_disk(subject)
        show(report, as_json=as_json)
        return 0 if report.good else 1
    setting = wish.url_setting or f"NX_{str(getattr(found, 'name', found.__name__)).upper()}_URL"
    async with _server(wish.server) as port:
        values = dict(environment.values)
        if wish.url or port:
            values[setting] = Value((wish.url or _ADDRESS).replace("{port}", str(port)), "command line")
        subject = Subject(found, Environment(values), options, url_setting=setting, count=_count(wish, port))
        report = await prove(subject, tell=lambda line: None if as_json else console.say(line))
    show(report, as_json=as_json)
    return 0 if report.good else 1


def _count(wish: Wish, port: int) -> Count | None:
    if wish.count_command:
        return count_by_command(wish.count_command.replace("{port}", str(port)))
    return count_by_url(wish.count_url.replace("{port}", str(port))) if wish.count_url else None


@asynccontextmanager
async def _server(command: str | None) -> AsyncIterator[int]:
    """Run the server of a destination on a free port and give the port; 0 when there is none to run."""
    if command is None:
        yield 0
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    words = shlex.split(command.replace("{port}", str(port)))
    try:
        # what it prints must not get into --json
        process = await asyncio.create_subprocess_exec(*words, stdin=asyncio.subprocess.DEVNULL, stdout=sys.stderr)
    except OSError as error:
        raise ConfigurationError(f"--server: {words[0]} cannot be started: {error.strerror}") from None
    try:
        await _until_it_listens(process, port)
        yield port
    finally:
        await _end(process)


async def _until_it_listens(process: asyncio.subprocess.Process, port: int) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + START_SECONDS
    while loop.time() < until:
        if process.returncode is not None:
            raise ConfigurationError(f"--server ended with status {process.returncode} instead of serving")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
            continue
        writer.close()
        return
    raise ConfigurationError(f"--server does not listen on 127.0.0.1:{port}; its command needs {{port}}")


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def show(report: Report, *, as_json: bool, details: bool = True) -> None:
    """Print a report: a line for each fault, what is wrong, the marks, and the score as the last line."""
    if as_json:
        console.print_json(report.as_json())
        return
    rows = []
    for name in report.faults if details else ():
        cases = [case for case in report.cases if case.fault == name]
        endings = sorted({case.ending for case in cases})
        failed = sum(bool(case.problems) for case in cases)
        verdict = "ok" if cases and not failed else f"{failed} of {len(cases)} FAILED"
        slowest = max((case.seconds for case in cases), default=0.0)
        rows.append((name, verdict, len(cases), ", ".join(endings), f"{slowest:.1f} s"))
    if rows:
        console.table(("fault", "verdict", "cases", "endings", "slowest"), rows)
    for name, problem in report.problems:
        console.say(f"! {name}: {problem.kind}: {problem.text}", "red")
    if details:
        grade_table([report])
    duplicates, losses = report.count("duplicate"), report.count("loss")
    console.say(f"conformance: {report.destination} {report.score}, {duplicates} duplicates, {losses} losses")


def grade_table(reports: Sequence[Report]) -> None:
    """Print the marks of each destination."""
    rows = []
    for report in reports:
        marks = ["yes" if earned else "NO" for earned in report.grades.values()]
        rows.append((report.destination, report.score, *marks))
    console.table(("destination", "faults", *GRADES), rows)
