"""The demonstration behind `make run`: five sample records from a message queue into an archive, before your eyes.

Everything it starts is its own and ends with it: a broker, a consumer with its database, an archive, all below
`.demo`. No setting of the caller is read, neither NX_* variables nor a .env file, so that sample records can never
reach a real repository.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rich.live import Live
from rich.table import Table

from tools.records import Record, make_record
from tools.servers.ports import free_port
from tools.servers.process import Child, ServerError, children, clean_environment, is_alive, stop
from tools.servers.rabbitmq import SCRIPTS, RabbitServer

PROJECT = Path(__file__).resolve().parents[1]
HOME = PROJECT / ".demo"
RECORDS = 5
COMPOSE = "docker-compose.yml"
ENGINE_SECONDS = 3
EXPORT_SECONDS = 60
STOP_SECONDS = 12  # the consumer ends within ten
POLL_SECONDS = 0.02
AFRESH = "to begin afresh: rm -rf .demo && make run"

_EXPORTED = re.compile(r"(exported|NOT EXPORTED) {2}(\S+)")
_RESULT = re.compile(r" {4}(\S+) +(.*)")
_SCRIPT = """\
#!/bin/sh
# nexus-export with the settings of the demonstration, in its folder, and with no NX_* variable of the caller
cd "$(dirname "$0")" || exit 1
for name in $(env | sed -n 's/^\\(NX_[A-Za-z0-9_]*\\)=.*/\\1/p'); do unset "$name"; done
NX_ENV_FILE=demo.env PYTHONPATH={project} exec {python} -m consumer "$@"
"""


class DemoError(Exception):
    """The demonstration cannot go on; the text says what, where and what to do next."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def listen() -> None:
    """Raise ``Interrupted`` at the first SIGINT or SIGTERM, wherever the program is then."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, _frame: object) -> None:
    ignore()
    raise Interrupted(number)


def ignore() -> None:
    """Take no more signals: what comes now is the orderly end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass(slots=True)
class Sample:
    """A record on its way."""

    record: Record
    path: Path
    published: bool = False
    archived: bool = False
    status: str = ""
    results: list[str] = field(default_factory=list)


class Demonstration:
    """The steps, and what they started."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._node: RabbitServer | None = None
        self._compose: dict[str, str] | None = None
        self._consumer: Child | None = None
        self._publisher: Child | None = None

    def run(self) -> None:
        """Show everything; returns when the demonstration is over."""
        say("Reading no .env and no NX_* variable of yours: sample records cannot reach a real repository.")
        prepare_folder()
        spare, *records = new_records()
        url = self._start_broker()
        answered = time.monotonic()
        write_settings(url)
        samples = [Sample(record, write_record(record)) for record in records]
        self._consumer = self._start("run", log="consumer.log")
        files = [str(sample.path) for sample in samples]
        say(f"Consumer started (log: {shown(HOME / 'consumer.log')}); publishing {RECORDS} new sample records:")
        say(f"  $ nexus-export publish {shown(HOME / 'records')}/*.xml --wait")
        self._publisher = self._start("publish", *files, "--wait", log="publish.log")
        self._watch(samples)
        heard = time.monotonic()
        summary(samples)
        say(
            f"Broker ready after {answered - self._began:.1f} s, the {RECORDS} outcomes {heard - answered:.1f} s "
            f"later, {heard - self._began:.1f} s in all."
        )
        write_record(spare, "next")
        interactive = sys.stdin.isatty()
        next_commands(HOME / "records" / "next" / spare.name, up=interactive)
        if interactive:
            self._stay()

    def stop(self) -> None:
        """Stop everything that was started, and nothing else."""
        ignore()
        if self._node is not None or self._compose is not None:
            say("Stopping what this started ...")
        for child in (self._publisher, self._consumer):
            if child is not None:
                child.stop(STOP_SECONDS)
        if self._node is not None:
            self._node.stop()
        if self._compose is not None:
            compose(self._compose, "down")
        # what was just being started when a signal arrived
        for pid in children(os.getpid()):
            stop(pid, STOP_SECONDS)

    def _start_broker(self) -> str:
        if engine_answers():
            self._compose = compose_environment()
            say("Broker: RabbitMQ in a container ...")
            if compose(self._compose, "up", "-d", "--wait", "rabbitmq"):
                return f"amqp://demo:demo@127.0.0.1:{self._compose['RABBITMQ_PORT']}/"
            say(f"It does not start ({shown(HOME / 'compose.log')} says why); a private node instead.")
            compose(self._compose, "down")
            self._compose = None
        install_rabbitmq()
        folder = HOME / "rabbitmq"
        complete = folder / "complete"
        if not complete.exists():  # a first start that was cut short leaves half of its data
            shutil.rmtree(folder, ignore_errors=True)
        start = "again" if complete.exists() else "first start"
        say(f"Broker: a private RabbitMQ node in {shown(folder)}, {start} ...")
        self._node = RabbitServer(folder)
        try:
            self._node.start()
        except (ServerError, TimeoutError) as error:
            raise DemoError(
                f"RabbitMQ does not start: {first_line(error)}; its log: {shown(folder / 'server.log')}; {AFRESH}"
            ) from None
        complete.touch()
        return self._node.url

    def _start(self, *arguments: str, log: str) -> Child:
        path = HOME / log
        path.unlink(missing_ok=True)
        return Child(
            [sys.executable, "-m", "consumer", *arguments],
            env=clean_environment(NX_ENV_FILE="demo.env", PYTHONPATH=str(PROJECT), COLUMNS="200"),
            log=path,
            cwd=HOME,
            at_our_death=signal.SIGTERM,
        )

    def _watch(self, samples: list[Sample]) -> None:
        """Follow the records until every outcome is heard."""
        deadline = time.monotonic() + EXPORT_SECONDS
        with live_table(samples) as show:
            while not all(sample.status for sample in samples):
                look(samples)
                show()
                self._check(samples, deadline)
                time.sleep(POLL_SECONDS)
            look(samples)
            show()

    def _check(self, samples: list[Sample], deadline: float) -> None:
        """Raise when what is awaited can no longer happen."""
        if self._consumer is None or not is_alive(self._consumer.pid):
            raise DemoError(f"the consumer ended by itself: {last_line('consumer.log')}")
        done = sum(bool(sample.status) for sample in samples)
        if (self._publisher is None or not is_alive(self._publisher.pid)) and done < RECORDS:
            look(samples)
            if not all(sample.status for sample in samples):
                raise DemoError(f"publishing ended by itself: {last_line('publish.log')}")
        if time.monotonic() > deadline:
            raise DemoError(
                f"only {done} of {RECORDS} outcomes came within {EXPORT_SECONDS} s; what the consumer says: "
                f"{last_line('consumer.log')}"
            )

    def _stay(self) -> None:
        """Stay up until Ctrl-C, which is the normal end here."""
        say("Ctrl-C stops everything this started.")
        with suppress(Interrupted):
            while self._consumer is not None and is_alive(self._consumer.pid):
                time.sleep(0.2)
            raise DemoError(f"the consumer ended by itself: {last_line('consumer.log')}")
        say("")


def say(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)


def shown(path: Path) -> str:
    """Return a path as short as the reader can use it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def last_line(log: str) -> str:
    """Quote the end of a log and say where the rest is and what to do."""
    path = HOME / log
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    end = lines[-1].strip()[:300] if lines else "nothing"
    return f"{end!r}; the whole log: {shown(path)}; {AFRESH}"


# --- before the start ------------------------------------------------------------------------------------------


def prepare_folder() -> None:
    """Make the folder, be the only demonstration in it, and refuse to run beside a .env."""
    HOME.mkdir(exist_ok=True)
    # kept open, and locked, until the process ends
    lock = os.open(HOME / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise DemoError(f"another demonstration runs in {shown(HOME)}; end that one with Ctrl-C first") from None
    if (HOME / ".env").exists():
        raise DemoError(f"{shown(HOME / '.env')} would be read by the consumer; move it away, then: make run")


def new_records() -> list[Record]:
    """Make records that no earlier run made: one to try things with, and those to be published."""
    counter = HOME / "next-record"
    first = int(counter.read_text(encoding="ascii")) if counter.exists() else 0
    count = RECORDS + 1
    counter.write_text(str(first + count), encoding="ascii")
    return [make_record(first + number, seed=2026, size=30_000 + 12_000 * number) for number in range(count)]


def write_record(record: Record, *below: str) -> Path:
    """Write a record file where record builders put theirs."""
    path = HOME.joinpath("records", *below, record.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(record.content)
    return path


def write_settings(url: str) -> None:
    """Write the settings of the consumer, and a command for the reader that uses them."""
    values = {"NX_AMQP_URL": url, "NX_DATA_PATH": str(HOME), "NX_LOCAL_ARCHIVE_PATH": str(HOME / "archive")}
    lines = [f"{name}={dotenv_text(value)}\n" for name, value in values.items()]
    (HOME / "demo.env").write_text("# written anew by each demonstration\n" + "".join(lines), encoding="utf-8")
    script = HOME / "nexus-export"
    script.write_text(
        _SCRIPT.format(project=shell_text(PROJECT), python=shell_text(sys.executable)), encoding="utf-8"
    )
    script.chmod(0o755)


def dotenv_text(value: str) -> str:
    """Quote a value for an environment file."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def shell_text(value: str | Path) -> str:
    """Quote a value for a shell script."""
    return "'" + str(value).replace("'", "'\\''") + "'"


# --- the broker ------------------------------------------------------------------------------------------------


def engine_answers() -> bool:
    """Whether a container engine could run the broker."""
    if shutil.which("docker") is None:
        return False
    try:
        done = subprocess.run(
            ["docker", "info"],
            env=engine_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ENGINE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def engine_environment(**settings: str) -> dict[str, str]:
    """Return what the docker command needs to find its engine, and these settings."""
    kept = {name: value for name, value in os.environ.items() if name == "HOME" or name.startswith("DOCKER_")}
    return clean_environment(**kept, **settings)


def compose_environment() -> dict[str, str]:
    """Return every variable of the compose file, so that it reads none of the caller's."""
    return engine_environment(
        RABBITMQ_PORT=str(free_port()),
        RABBITMQ_MANAGEMENT_PORT=str(free_port()),
        BROKER_USER="demo",
        BROKER_PASSWORD="demo",  # noqa: S106 - of a broker that only this machine reaches, for a minute
        DATABASE_PASSWORD="demo",  # noqa: S106 - the same, and not even started
        NX_DATA_PATH=str(HOME),
        NX_INSTRUMENT_DATA_PATH=str(HOME),
    )


def compose(environment: dict[str, str], *arguments: str) -> bool:
    """Run docker compose on the project's own file, without the .env beside it; tell whether it worked."""
    options = ["-p", "nexus-export-demo", "--env-file", os.devnull, "-f", COMPOSE]
    with (HOME / "compose.log").open("ab") as log:
        done = subprocess.run(
            ["docker", "compose", *options, *arguments],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=False,
        )
    return done.returncode == 0


def install_rabbitmq() -> None:
    """Install RabbitMQ if it is missing; the script says what and why before it does."""
    if (SCRIPTS / "rabbitmq-server").exists():
        return
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NX_")}
    process = subprocess.Popen(["sh", "tools/packages.sh", "rabbitmq"], cwd=PROJECT, env=environment)
    try:
        code = process.wait()
    except Interrupted:
        # as Ctrl-C at a terminal: the package manager hears it and ends where it can be taken up again
        for pid in [*descendants(process.pid), process.pid]:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGINT)
        process.wait()
        raise
    if code != 0:
        raise DemoError("RabbitMQ could not be installed (see above); install rabbitmq-server, then: make run")


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that a process started, and theirs."""
    for child in children(pid):
        yield from descendants(child)
        yield child


# --- watching --------------------------------------------------------------------------------------------------


def look(samples: Sequence[Sample]) -> None:
    """Note how far each record has come: what the publishing command said, and what lies in the archive."""
    log = HOME / "publish.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    known = {sample.record.session: sample for sample in samples}
    current: Sample | None = None
    for line in lines:
        if found := _EXPORTED.fullmatch(line):
            current = known.get(found[2])
            if current is not None:
                current.status, current.results = found[1], []
        elif current is not None and (found := _RESULT.fullmatch(line)):
            current.results.append(line.strip())
    for sample in samples:
        sample.archived = sample.archived or any((HOME / "archive").glob(f"*/*/*/{sample.path.stem}.json"))
        sample.published = sample.published or sample.archived or bool(sample.status)
        sample.published = sample.published or any(line.startswith(f"{len(samples)} published") for line in lines)


@contextmanager
def live_table(samples: Sequence[Sample]) -> Iterator[Callable[[], None]]:
    """Show the records on their way; yields the function that shows what has changed."""
    before = list[tuple[object, ...]]()

    def changed() -> bool:
        now: list[tuple[object, ...]] = [(s.published, s.archived, s.status) for s in samples]
        same = now == before
        before[:] = now
        return not same

    if not sys.stdout.isatty():
        yield lambda: say(counts_of(samples)) if changed() else None
        return
    with Live(table_of(samples), auto_refresh=False) as live:
        yield lambda: live.update(table_of(samples), refresh=True) if changed() else None


def table_of(samples: Sequence[Sample]) -> Table:
    """Draw how far each record has come."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("record", "published", "archived", "outcome heard"):
        table.add_column(column)
    for sample in samples:
        marks = ["yes" if mark else "..." for mark in (sample.published, sample.archived)]
        table.add_row(sample.path.stem, *marks, sample.status or "...")
    return table


def counts_of(samples: Sequence[Sample]) -> str:
    """Say how far the records have come."""
    published, archived = (sum(getattr(sample, stage) for sample in samples) for stage in ("published", "archived"))
    heard = sum(bool(sample.status) for sample in samples)
    return f"  {published} published, {archived} archived, {heard} outcomes heard"


# --- afterwards ------------------------------------------------------------------------------------------------


def summary(samples: Sequence[Sample]) -> None:
    """Say for each record what became of it and where it lies."""
    failed = [sample for sample in samples if sample.status != "exported"]
    for sample in samples:
        say(f"{sample.status}: session {sample.record.session} (by {sample.record.user})")
        for result in sample.results:
            url = result.rsplit(" ", 1)[-1]
            if not url.startswith("file:"):
                say(f"  {result}")
                continue
            file = Path(unquote(urlsplit(url).path))
            manifest = file.with_suffix(".json")
            size = json.loads(manifest.read_text(encoding="utf-8"))["size"]
            say(f"  record   {shown(file)} ({size:,} bytes)")
            say(f"  manifest {shown(manifest)}")
    if failed:
        raise DemoError(
            f"{len(failed)} of {len(samples)} records were not exported (above it says why); "
            f"what the consumer says: {last_line('consumer.log')}"
        )


def next_commands(spare: Path, *, up: bool) -> None:
    """Print commands that work now."""
    command = shown(HOME / "nexus-export")
    if up:
        say("Try in another terminal:")
        say(f"  {command} status")
        say(f"  {command} publish {spare} --wait")
    else:
        say("Try (in a terminal, `make run` stays up, then `status` and `publish` work too):")
        say(f"  {command} export {spare}")
    say(f"  {command} destinations")
    say(f"  {command} config show")


def main() -> int:
    """Run the demonstration to its exit code."""
    listen()
    demonstration = Demonstration()
    failure = ""
    try:
        try:
            demonstration.run()
        except DemoError as error:
            failure = str(error)
        except (OSError, ServerError, subprocess.SubprocessError, ValueError) as error:
            failure = f"{first_line(error)}; what was done so far is in {shown(HOME)}; {AFRESH}"
        demonstration.stop()
    except Interrupted as interrupted:
        say("")
        demonstration.stop()
        return 128 + interrupted.number
    if failure:
        print(f"The demonstration failed: {failure}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
