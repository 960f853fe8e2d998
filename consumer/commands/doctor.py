"""``doctor``: looks at everything the service needs; says what is wrong and what to do."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from consumer.broker import DEAD_QUEUE, WORK_QUEUE, BrokerAwayError, Client, queue_depths
from consumer.commands import console
from consumer.commands.destinations import check_all
from consumer.commands.settings import unknown_names
from consumer.config import Environment, Settings
from consumer.destinations.registry import Registry
from consumer.store import notices, schema
from consumer.store.connection import Database, DatabaseError, file_system_of

LOW_DISK_BYTES = 500 * 1024**2
#: So long a loss is told.
NOTICE_DAYS = 7


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; ``advice`` is empty when it is well."""

    what: str
    state: str
    advice: str = ""


async def run_doctor(
    settings: Settings, environment: Environment, database: Database, registry: Registry, *, as_json: bool
) -> int:
    """Print all findings; returns 1 when one of them needs a person."""
    findings = [
        *await _broker(settings),
        *await _database(database),
        *_paths(settings),
        *await _destinations(registry),
        *_names(environment, registry),
    ]
    if as_json:
        console.print_json([{"what": f.what, "state": f.state, "advice": f.advice} for f in findings])
    else:
        for finding in findings:
            console.say(f"{'! ' if finding.advice else '  '}{finding.what}: {finding.state}",
                        "red" if finding.advice else None)  # fmt: skip
            if finding.advice:
                console.say(f"      {finding.advice}")
        wrong = sum(bool(finding.advice) for finding in findings)
        console.say(f"{wrong} of {len(findings)} need you" if wrong else "all well", "red" if wrong else "green")
    return 1 if any(finding.advice for finding in findings) else 0


async def _broker(settings: Settings) -> list[Finding]:
    url = settings.amqp_url.get_secret_value()
    try:
        depths = await queue_depths(url)
        async with Client(url, settings.amqp_exchange):
            pass  # declaring again tells whether queues exist with other arguments
    except BrokerAwayError as error:
        return [Finding("RabbitMQ", str(error), "start RabbitMQ, or correct NX_AMQP_URL")]
    found = [Finding("RabbitMQ", "reached; exchange and queues are as they should be")]
    if depths[WORK_QUEUE] is None:
        found.append(Finding(f"queue {WORK_QUEUE}", "was missing and is declared now: "
                             "events published while it was missing are lost unless the builder noticed",
                             "publish again what was built meanwhile: nexus-export publish"))  # fmt: skip
    dead = depths[DEAD_QUEUE]
    if dead:
        found.append(Finding(f"queue {DEAD_QUEUE}", f"{dead} dead letters", "see why: nexus-export status"))
    return found


async def _database(database: Database) -> list[Finding]:
    where = str(database.path) if database.is_sqlite else f"{database.url.host}/{database.url.database}"
    try:
        revision = await schema.current(database)
    except DatabaseError as error:
        return [Finding(f"database {where}", str(error).splitlines()[0], "start it, or correct NX_DATABASE_URL")]
    newest = schema.head()
    kind = f"SQLite on {file_system_of(database.path)}" if database.is_sqlite else "PostgreSQL"
    if revision is None:
        return [Finding(f"database {where}", f"{kind}, empty: the first run makes its tables")]
    if revision != newest:
        return [Finding(f"database {where}", f"at {revision}, not {newest}", "nexus-export db upgrade")]
    return [Finding(f"database {where}", f"{kind}, revision {revision}"), *await _notices(database)]


async def _notices(database: Database) -> list[Finding]:
    """Tell what happened lately that nobody can mend afterwards."""
    async with database.read() as connection:
        now = await database.now(connection)
        found = await notices.since(connection, now - timedelta(days=NOTICE_DAYS))
    at = found.get(notices.WORK_QUEUE_GONE)
    if at is None:
        return []
    return [Finding(f"queue {WORK_QUEUE}", f"was gone {console.ago(at)} and was declared again: what was in it, and "
                    "events published while it was missing, may be lost",
                    "publish again what was built around that time: nexus-export publish; this line ends after "
                    f"{NOTICE_DAYS} days")]  # fmt: skip


def _paths(settings: Settings) -> Iterator[Finding]:
    records = settings.resolved_records_path
    if records is None:
        yield Finding("records", "neither NX_RECORDS_PATH nor NX_DATA_PATH is set: only records inside events work",
                      "set NX_DATA_PATH to the data folder of NexusLIMS")  # fmt: skip
    elif not records.is_dir():
        yield Finding(f"records {records}", "not there", "mount it, or correct NX_RECORDS_PATH")
    elif not os.access(records, os.R_OK | os.X_OK):
        yield Finding(f"records {records}", "not readable for this user", "give this user the right to read it")
    else:
        yield Finding(f"records {records}", "readable")
    yield _writable("spool", settings.resolved_spool_path)


def _writable(what: str, folder: Path) -> Finding:
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(f"{what} {folder}", f"{existing} is not writable for this user", "give this user the right")
    free = shutil.disk_usage(existing).free
    if free < LOW_DISK_BYTES:
        return Finding(f"{what} {folder}", f"only {free // 1024**2} MiB free", "make room on this disk")
    return Finding(f"{what} {folder}", f"writable, {free // 1024**3} GiB free")


async def _destinations(registry: Registry) -> list[Finding]:
    answers = await check_all(registry)
    found = [
        Finding(f"destination {name}", problem or "ready", "correct its settings, then: nexus-export destinations"
                if problem else "")
        for name, problem in answers.items()
    ]  # fmt: skip
    found += [Finding(f"plugin {p.origin}", p.message, "mend or remove it") for p in registry.problems]
    if not registry.enabled:
        found.append(Finding("destinations", "none is enabled", "set NX_CDCS_URL and NX_CDCS_TOKEN, or "
                             "NX_LOCAL_ARCHIVE_PATH"))  # fmt: skip
    return found


def _names(environment: Environment, registry: Registry) -> Iterator[Finding]:
    for name, suggestion in unknown_names(environment, registry).items():
        hint = f"did you mean {suggestion}?" if suggestion else "remove it, or see: nexus-export config show"
        yield Finding(f"setting {name}", "nothing here reads it", hint)
