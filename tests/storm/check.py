"""Joins what the server holds with what the consumer says; it shares no code with the consumer.

A copy counts as late when the server itself committed it later than the settle time after its request had come. More
copies than one that are not late are duplicates; late ones have to be named by ``upload_log``.
"""

import json
import sqlite3
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.storm.traffic import OUTCOMES, SOURCE, Announced

Key = tuple[str, str]

#: How ``upload_log`` names attempts after which nobody could know whether a copy was made.
UNKNOWN = ("unknown_outcome", "timeout", "interrupted", "plugin_error", "internal_error")
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Copy:
    """One line of a ledger."""

    id: str
    key: str
    session: str
    sha256: str
    fault: str
    delay: float


@dataclass(slots=True)
class Report:
    """What was found; ``problems`` are things that are wrong without being a loss or a duplicate."""

    outcomes: int = 0
    settled: int = 0
    late_reported: int = 0
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    late_unreported: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Tell whether the promise was kept."""
        return not (self.lost or self.duplicated or self.late_unreported or self.problems)

    def details(self) -> Iterable[str]:
        """Describe what is wrong, the first of each kind."""
        kinds = {
            "LOST": self.lost,
            "DUPLICATED": self.duplicated,
            "LATE AND NOT REPORTED": self.late_unreported,
            "WRONG": self.problems,
        }
        for kind, found in kinds.items():
            yield from (f"{kind}: {text}" for text in found[:SHOWN])
            if len(found) > SHOWN:
                yield f"{kind}: and {len(found) - SHOWN} more"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that is compared."""

    events: Sequence[Announced]
    heard: Sequence[Mapping[str, Any]]
    copies: Mapping[Key, Sequence[Copy]]
    log: Sequence[Mapping[str, Any]]
    outbox: Sequence[Mapping[str, Any]]
    states: Mapping[str, int]


def read_ledgers(folder: Path) -> dict[Key, list[Copy]]:
    """Read the copies of every (session, destination), oldest first."""
    found: dict[Key, list[Copy]] = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            copy = Copy(**json.loads(line))
            found[copy.session, path.stem].append(copy)
    return dict(found)


def read_evidence(
    events: Sequence[Announced],
    heard: Sequence[Mapping[str, Any]],
    copies: Mapping[Key, Sequence[Copy]],
    db: Path,
) -> Evidence:
    """Read the database, and put it beside the rest."""
    with closing(sqlite3.connect(f"{db.as_uri()}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row

        def rows(query: str) -> list[dict[str, Any]]:
            return [dict(row) for row in connection.execute(query)]

        states = Counter({f"job {row['state']}": row["n"] for row in rows(_COUNT.format(table="jobs"))})
        states += Counter({f"step {row['state']}": row["n"] for row in rows(_COUNT.format(table="steps"))})
        log = rows("SELECT * FROM upload_log ORDER BY id")
        outbox = rows("SELECT kind, message_id, sent_at FROM outbox")
    return Evidence(events, heard, copies, log, outbox, states)


_COUNT = "SELECT state, count(*) AS n FROM {table} GROUP BY state"


def check(evidence: Evidence, destinations: Sequence[str], settle_seconds: float) -> Report:
    """Compare everything with everything."""
    report = Report()
    by_cause = _one_outcome_each(report, evidence)
    for event in evidence.events:
        outcome = by_cause.get(event.event_id)
        if outcome is None:
            report.lost.append(f"event {event.event_id}, session {event.session}: no outcome")
        else:
            _check_copies(report, evidence, event, outcome, destinations)
    _check_ledgers(report, evidence, settle_seconds)
    _check_log(report, evidence, by_cause)
    _check_database(report, evidence, by_cause, destinations)
    return report


def _one_outcome_each(report: Report, evidence: Evidence) -> dict[str, Mapping[str, Any]]:
    """Return the outcome of each event; a repeated message with an equal id has to be equal altogether."""
    by_cause: dict[str, Mapping[str, Any]] = {}
    for outcome in evidence.heard:
        cause = str(outcome["data"]["cause"]["id"])
        first = by_cause.setdefault(cause, outcome)
        if first["id"] != outcome["id"]:
            report.problems.append(f"event {cause} has two outcomes: {first['id']} and {outcome['id']}")
        elif first != outcome:
            report.problems.append(f"outcome {outcome['id']} came twice and differs")
    for cause, outcome in by_cause.items():
        job = uuid.uuid5(uuid.uuid5(uuid.NAMESPACE_URL, SOURCE), cause)
        if outcome["id"] != str(uuid.uuid5(job, "1")):
            report.problems.append(f"the outcome of event {cause} has the id {outcome['id']}")
    strangers = set(by_cause) - {event.event_id for event in evidence.events}
    report.problems += [f"an outcome of event {cause}, which nobody published" for cause in strangers]
    ids = Counter(outcome["id"] for outcome in by_cause.values())
    report.problems += [f"{count} events share the outcome id {one}" for one, count in ids.items() if count > 1]
    report.outcomes = len(by_cause)
    return by_cause


def _check_copies(
    report: Report, evidence: Evidence, event: Announced, outcome: Mapping[str, Any], destinations: Sequence[str]
) -> None:
    """Look for the copies that an outcome tells of."""
    data = outcome["data"]
    results = {result["destination"]: result for result in data["results"]}
    if data["session_identifier"] != event.session or sorted(results) != sorted(destinations):
        report.problems.append(f"the outcome of {event.event_id} tells of {data['session_identifier']}, {results}")
    if outcome["type"] != OUTCOMES[0] or data["status"] != "COMPLETED":
        report.problems.append(f"session {event.session}: {outcome['type']}, {data['status']}")
    for name, result in results.items():
        if not result["success"]:
            reason = f"{result['error_code']}: {result['error_message']}"
            report.problems.append(f"session {event.session} failed at {name}: {reason}")
            continue
        live = evidence.copies.get((event.session, name), ())
        if not any(copy.id == result["record_id"] and copy.sha256 == event.sha256 for copy in live):
            report.lost.append(f"session {event.session}: {name} has no copy {result['record_id']} with its bytes")


def _check_ledgers(report: Report, evidence: Evidence, settle_seconds: float) -> None:
    """Count copies beyond the first; those that the server committed too late have to be reported by their ids."""
    sessions = {event.session for event in evidence.events}
    reports: dict[Key, str] = defaultdict(str)
    for row in evidence.log:
        if row["error_code"] == "surplus_copy":
            reports[row["session_identifier"], row["destination_name"]] += (
                f" {row['record_id']} {row['error_message']}"
            )
    for (session, name), live in evidence.copies.items():
        where = f"session {session} at {name}"
        if session not in sessions or len({copy.key for copy in live}) != 1:
            report.problems.append(f"{where} is unknown, or has several keys")
        late = min(len(live) - 1, sum(copy.delay > settle_seconds for copy in live))
        surplus = len(live) - 1 - late
        told = ", ".join(f"{copy.id} ({copy.fault or 'no fault'}, after {copy.delay:g} s)" for copy in live)
        report.duplicated += [f"{where}: {told}"] * surplus
        if late and all(copy.id in reports[session, name] for copy in live):
            report.late_reported += late
        elif late:
            report.late_unreported += [f"{where}: {told}"] * late
    false = [key for key, text in reports.items() if text and len(evidence.copies.get(key, ())) < 2]
    report.problems += [f"{session} at {name}: a surplus was reported that is not there" for session, name in false]


def _check_log(report: Report, evidence: Evidence, by_cause: Mapping[str, Mapping[str, Any]]) -> None:
    """Every success of an outcome is in ``upload_log``, under the same id; counts what was unknown for a while."""
    good: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in evidence.log:
        if row["success"]:
            good[row["event_id"], row["destination_name"]].add(row["record_id"])
    for cause, outcome in by_cause.items():
        for result in outcome["data"]["results"]:
            if result["success"] and result["record_id"] not in good[cause, result["destination"]]:
                report.problems.append(f"upload_log has no success of event {cause} at {result['destination']}")
    report.settled = sum(not row["success"] and row["error_code"] in UNKNOWN for row in evidence.log)
    missing = [row for row in evidence.log if row["error_code"] == "copy_missing"]
    report.problems += [f"copy_missing was reported for {row['session_identifier']}" for row in missing]


def _check_database(
    report: Report, evidence: Evidence, by_cause: Mapping[str, Mapping[str, Any]], destinations: Sequence[str]
) -> None:
    """Nothing is open, and the outbox holds the very outcomes that were heard."""
    count = len(evidence.events)
    wanted = {"job exported": count, "step done": count * len(destinations)}
    if dict(evidence.states) != wanted:
        report.problems.append(f"the database holds {dict(evidence.states)} instead of {wanted}")
    written = {row["message_id"] for row in evidence.outbox if row["kind"] == "outcome"}
    if written != {outcome["id"] for outcome in by_cause.values()} or len(evidence.outbox) != count:
        report.problems.append(f"the outbox has {len(evidence.outbox)} messages; its outcomes are not those heard")
    unsent = sum(row["sent_at"] is None for row in evidence.outbox)
    if unsent:
        report.problems.append(f"{unsent} messages were never sent")
