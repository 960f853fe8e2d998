"""The proof behind `make e2e`: records through a real broker to a real CDCS and the archive, compared byte by byte.

The records are published by a script that uses nothing of this project. What arrived is read back by other ways than
those of the consumer: CDCS over HTTP, the archive from the disk, the log with sqlite3, the queues with aio-pika.
"""

import argparse
import asyncio
import hashlib
import http.client
import json
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import aio_pika

from tools.records import Record, write_records
from tools.servers.cdcs import CdcsServer
from tools.servers.process import Child, clean_environment, is_alive, tail
from tools.servers.rabbitmq import RabbitServer

PROJECT = Path(__file__).resolve().parents[1]
EXCHANGE = "nexuslims.records"
WORK_QUEUE, DEAD_QUEUE, OWN_QUEUE = "nexuslims.export", "nexuslims.export.dead", "e2e.outcomes"
OUTCOMES = ("record.exported", "record.export_failed")
DESTINATIONS = ("cdcs", "local_archive")
SIZES = (30_000, 100_000)
STALL_SECONDS = 60
SURPLUS_SECONDS = 1
READERS = 4


class E2eError(Exception):
    """The run could not be brought to its end; the text says why and where."""


@dataclass(slots=True)
class Found:
    """What was read back, and every way in which it is not as it should be."""

    exported: int = 0
    equal: Counter[str] = field(default_factory=Counter)
    lost: set[str] = field(default_factory=set)
    duplicated: int = 0
    log_rows: int = 0
    problems: list[str] = field(default_factory=list)

    def expect(self, what: str, real: object, wanted: object) -> None:
        """Note a problem unless both are equal."""
        if real != wanted:
            self.problems.append(f"{what}: {real} instead of {wanted}")


@dataclass(frozen=True, slots=True)
class Heard:
    """The file names of the published events, what came to the queue of outcomes, and how long all of it took."""

    published: dict[str, str]
    outcomes: list[dict[str, Any]]
    seconds: float


async def run(count: int, folder: Path, rabbit: RabbitServer, consumer: Child) -> Heard:
    """Publish the records of a folder and wait for an outcome of each."""
    outcomes: list[dict[str, Any]] = []
    causes: set[str] = set()

    async def take(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        outcome = json.loads(message.body)
        outcomes.append(outcome)
        causes.add(outcome["data"]["cause"]["id"])

    connection = await aio_pika.connect(rabbit.url)
    async with connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
        queue = await channel.declare_queue(OWN_QUEUE, durable=True)
        for kind in OUTCOMES:
            await queue.bind(exchange, kind)
        await queue.consume(take, no_ack=True)
        began = time.monotonic()
        published = await publish(folder, rabbit.url)
        last, since = -1, time.monotonic()
        while len(causes) < count:
            if len(causes) != last:
                last, since = len(causes), time.monotonic()
            if not is_alive(consumer.pid) or time.monotonic() - since > STALL_SECONDS:
                raise E2eError(f"stands still at {last} of {count} outcomes{tail(consumer.log)}")
            await asyncio.sleep(0.05)
        seconds = time.monotonic() - began
        await asyncio.sleep(SURPLUS_SECONDS)  # outcomes that should not exist may still come
    return Heard(published, outcomes, seconds)


async def publish(folder: Path, url: str) -> dict[str, str]:
    """Let the plain script publish all files of a folder; returns the file name of each event id."""
    publisher = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", PROJECT / "tools" / "plain_publisher.py", folder, url),
        stdout=asyncio.subprocess.PIPE,
        env=clean_environment(),
    )
    try:
        printed, _ = await publisher.communicate()
    finally:
        if publisher.returncode is None:
            publisher.kill()
    if publisher.returncode != 0:
        raise E2eError(f"the publisher ended with {publisher.returncode} (see above)")
    return dict(line.split("\t") for line in printed.decode().splitlines())


async def queue_lengths(url: str) -> dict[str, int | None]:
    """Return how many messages wait where, the consumer being gone."""
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        queues = [await channel.declare_queue(name, passive=True) for name in (WORK_QUEUE, DEAD_QUEUE)]
        return {queue.name: queue.declaration_result.message_count for queue in queues}


# --- reading back ----------------------------------------------------------------------------------------------


class CdcsReader:
    """Reads CDCS over plain HTTP."""

    def __init__(self, server: CdcsServer) -> None:
        self._port = server.port
        self._headers = {"Authorization": f"Token {server.admin_token}", "Content-Type": "application/json"}

    def get(self, path: str) -> Any:
        """Return the JSON of an address, None when there is nothing."""
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)) as connection:
            connection.request("GET", path, headers=self._headers)
            answer = connection.getresponse()
            content = answer.read()
        if answer.status == http.client.NOT_FOUND:
            return None
        if answer.status != http.client.OK:
            raise E2eError(f"CDCS answered {answer.status} to GET {path}: {content[:300]!r}")
        return json.loads(content)


def result_of(outcome: Mapping[str, Any], destination: str) -> Mapping[str, Any]:
    """Return what an outcome says of a destination."""
    return next((r for r in outcome["data"]["results"] if r["destination"] == destination), {})


def check_outcomes(found: Found, heard: Heard) -> dict[str, dict[str, Any]]:
    """Check that each event has one outcome, a success everywhere; returns the outcomes by session."""
    by_cause: dict[str, dict[str, Any]] = {}
    for outcome in heard.outcomes:
        cause = outcome["data"]["cause"]["id"]
        if by_cause.setdefault(cause, outcome)["id"] != outcome["id"]:
            found.problems.append(f"event {cause} has two outcomes")
    found.lost.update(name for event, name in heard.published.items() if event not in by_cause)
    found.exported = sum(outcome["type"] == OUTCOMES[0] for outcome in by_cause.values())
    for outcome in by_cause.values():
        for result in outcome["data"]["results"]:
            if not result["success"]:
                found.problems.append(f"{outcome['subject']}: {result['destination']}: {result['error_message']}")
    return {outcome["data"]["session_identifier"]: outcome for outcome in by_cause.values()}


def check_cdcs(found: Found, records: list[Record], outcomes: Mapping[str, Any], reader: CdcsReader) -> None:
    """Fetch every record back and compare its bytes with the file; count the titles of all that CDCS has."""

    def stored(record: Record) -> Any:
        record_id = result_of(outcomes.get(record.session, {"data": {"results": []}}), "cdcs").get("record_id")
        return reader.get(f"/rest/data/{record_id}/") if record_id else None

    with ThreadPoolExecutor(READERS) as pool:
        for record, answer in zip(records, pool.map(stored, records), strict=True):
            if answer is None or answer["xml_content"].encode() != record.content:
                found.lost.add(record.name)
                found.problems.append(f"CDCS does not have the bytes of {record.name}")
                continue
            found.equal["cdcs"] += 1
            if answer["title"] != Path(record.name).stem or answer["workspace"] is None:
                found.problems.append(f"{record.name} is titled {answer['title']!r} in {answer['workspace']}")
    titles = Counter(entry["title"] for entry in reader.get("/rest/admin/data/"))
    found.duplicated += sum(titles.values()) - len(titles)
    found.expect("titles at CDCS", len(titles), len(records))


def check_archive(found: Found, records: list[Record], outcomes: Mapping[str, Any], root: Path) -> None:
    """Compare every file with the record, where the outcome says it is and where the layout says."""
    for record in records:
        month = f"{record.dt_from.year:04}/{record.dt_from.month:02}"
        place = root / record.instrument_pid / month / record.name
        url = result_of(outcomes.get(record.session, {"data": {"results": []}}), "local_archive").get("record_url")
        told = Path(unquote(urlsplit(url or "").path))
        if told != place or not place.is_file() or place.read_bytes() != record.content:
            found.lost.add(record.name)
            found.problems.append(f"{place} is not {record.name}, or not where the outcome says ({told})")
            continue
        manifest = json.loads(place.with_suffix(".json").read_bytes())
        if (manifest["session_identifier"], manifest["sha256"]) != (record.session, sha256(record.content)):
            found.problems.append(f"the manifest of {place} is about something else")
        if "cdcs" not in manifest["links"]:
            found.problems.append(f"the manifest of {place} has no link to CDCS")
        found.equal["archive"] += 1
    files = sum(1 for path in root.rglob("*.xml"))
    found.duplicated += max(0, files - len(records))


def check_log(found: Found, records: list[Record], database: Path) -> None:
    """Count the rows of upload_log: one success for each record and destination, and nothing else."""
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT session_identifier, destination_name, success FROM upload_log").fetchall()
    found.log_rows = len(rows)
    good = {(session, name) for session, name, success in rows if success}
    wanted = {(record.session, name) for record in records for name in DESTINATIONS}
    found.expect("upload_log rows", len(rows), len(wanted))
    found.expect("sessions and destinations with a success in upload_log", len(good & wanted), len(wanted))


def sha256(content: bytes) -> str:
    """Return the digest as hexadecimal text."""
    return hashlib.sha256(content).hexdigest()


# --- all of it -------------------------------------------------------------------------------------------------


def start_servers(stack: ExitStack, folder: Path) -> tuple[RabbitServer, CdcsServer]:
    """Start broker and CDCS beside each other."""
    rabbit, cdcs = RabbitServer(folder / "rabbitmq"), CdcsServer(folder / "cdcs")
    # killed at the end: what they hold is thrown away
    stack.callback(rabbit.kill)
    stack.callback(cdcs.kill)
    starts: tuple[Callable[[], None], ...] = (rabbit.start, cdcs.start)
    with ThreadPoolExecutor(len(starts)) as pool:
        for start in [pool.submit(start) for start in starts]:
            start.result()
    return rabbit, cdcs


def start_consumer(folder: Path, rabbit: RabbitServer, cdcs: CdcsServer) -> Child:
    """Start the consumer with both destinations, in a folder without .env."""
    settings = {
        "NX_AMQP_URL": rabbit.url,
        "NX_DATA_PATH": str(folder),
        "NX_CDCS_URL": cdcs.url,
        "NX_CDCS_TOKEN": cdcs.admin_token,
        "NX_CDCS_ASSIGN_TO_PUBLIC_WORKSPACE": "true",
        "NX_LOCAL_ARCHIVE_PATH": str(folder / "archive"),
    }
    return Child(
        [sys.executable, "-m", "consumer", "run"],
        env=clean_environment(**settings, PYTHONPATH=str(PROJECT)),
        log=folder / "consumer.log",
        cwd=folder,
        at_our_death=signal.SIGTERM,
    )


def whole_run(folder: Path, count: int) -> Iterator[str]:
    """Do everything, telling each step; the last line is the result. Raises ``E2eError``."""
    began = time.monotonic()
    records = write_records(folder / "records", count, sizes=SIZES)
    size = sum(len(record.content) for record in records)
    sizes = f"{SIZES[0] // 1000}-{SIZES[1] // 1000} kB, {size / 1e6:.1f} MB"
    yield f"{count} records of {sizes}; starting RabbitMQ and a real CDCS"
    found = Found()
    with ExitStack() as stack:
        rabbit, cdcs = start_servers(stack, folder)
        consumer = start_consumer(folder, rabbit, cdcs)
        running = stack.enter_context(ExitStack())
        running.callback(consumer.stop, 12)
        yield "publishing with plain aio-pika; waiting for every outcome"
        heard = asyncio.run(run(count, folder / "records", rabbit, consumer))
        running.close()
        yield "reading everything back"
        found.expect("events published", len(heard.published), count)
        outcomes = check_outcomes(found, heard)
        check_cdcs(found, records, outcomes, CdcsReader(cdcs))
        check_archive(found, records, outcomes, folder / "archive")
        check_log(found, records, folder / "nexus-export.db")
        lengths = asyncio.run(queue_lengths(rabbit.url))
        found.expect("messages left", lengths, dict.fromkeys((WORK_QUEUE, DEAD_QUEUE), 0))
    found.expect("exported", found.exported, count)
    found.expect("lost", len(found.lost), 0)
    found.expect("duplicated", found.duplicated, 0)
    yield from (f"WRONG: {problem}" for problem in found.problems)
    yield (
        f"{heard.seconds:.1f} s from the first event to the last outcome, {count / heard.seconds:.1f} records/s; "
        f"{time.monotonic() - began:.1f} s with servers and checks"
    )
    yield (
        f"e2e: {len(heard.published)} published, {found.exported} exported, cdcs {found.equal['cdcs']} equal, "
        f"archive {found.equal['archive']} equal, upload_log {found.log_rows} rows, {len(found.lost)} lost, "
        f"{found.duplicated} duplicated"
    )
    if found.problems:
        raise E2eError(f"{len(found.problems)} things are wrong")


def main(arguments: list[str] | None = None) -> int:
    """Export many records and compare; exit code 1 when anything is off."""
    parser = argparse.ArgumentParser(prog="python -m tools.e2e", description=main.__doc__)
    parser.add_argument("--records", type=int, default=200)
    count = parser.parse_args(arguments).records
    if count < 1:
        parser.error("--records: at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="nexus-e2e-"))
    try:
        for line in whole_run(folder, count):
            print(line, flush=True)
    except E2eError as error:
        print(f"e2e failed: {error}; everything is kept in {folder}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; everything is kept in {folder}", file=sys.stderr)
        return 130
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
