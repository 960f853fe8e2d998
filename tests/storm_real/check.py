"""Joins what the destinations hold with what the consumer says; it shares no code with the consumer.

Events, outcomes, upload_log and outbox are compared as after every storm (``tests.storm.check``). Here come what a
copy consists of, and its link to the record in CDCS, however late that record came.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.storm.check import Copy, Evidence, Report, check, read_evidence
from tests.storm.traffic import Announced
from tests.storm_real.holdings import Held, by_copy

DESTINATIONS = ("cdcs", "elabftw", "labarchives", "local_archive")
NOTEBOOKS = ("elabftw", "labarchives")
SHOWN = 20


@dataclass(slots=True)
class Findings:
    """What was found, beside what every storm is checked for."""

    report: Report
    missing_links: list[str] = field(default_factory=list)
    #: links that came after their notebook's outcome, links written more than once
    late_links: int = 0
    repeated_links: int = 0

    @property
    def good(self) -> bool:
        """Tell whether the promise was kept."""
        return self.report.good and not self.missing_links

    def details(self) -> Iterable[str]:
        """Describe what is wrong."""
        yield from self.report.details()
        yield from (f"LINK MISSING: {text}" for text in self.missing_links[:SHOWN])


def judge(
    events: Sequence[Announced], heard: Sequence[Mapping[str, Any]], database: Path, held: Iterable[Held], cdcs: str
) -> Findings:
    """Compare everything with everything; ``cdcs`` is its address, with the slash."""
    copies = by_copy(held)
    lines = {key: [_line(copy) for copy in found] for key, found in copies.items()}
    evidence = read_evidence(events, heard, lines, database)
    findings = Findings(check(evidence, DESTINATIONS, settle_seconds=0.0))
    for event in events:
        for name in DESTINATIONS:
            for copy in copies.get((event.session, name), ()):
                _check_parts(findings.report, event, copy)
        for name in NOTEBOOKS:
            _check_links(findings, event, name, copies, cdcs)
    findings.late_links = _late_links(evidence)
    _check_steps(findings.report, database)
    return findings


def stem_of(event: Announced) -> str:
    """Return the file name, without its ending, of an announced record."""
    return Path(json.loads(event.body)["data"]["record"]["path"]).stem


def _line(copy: Held) -> Copy:
    """Return a copy as every storm's check wants it; it counts as whole with exactly one file."""
    sha256 = copy.files[0] if len(set(copy.files)) == 1 else f"{len(copy.files)} files"
    return Copy(copy.id, copy.destination, copy.session, sha256, fault="", delay=0.0)


def _check_parts(report: Report, event: Announced, copy: Held) -> None:
    """One file with the record's bytes, one summary, the right name."""
    where = f"session {event.session}: {copy.destination} {copy.id} ({copy.title})"
    if len(copy.files) > 1:
        report.duplicated.append(f"{where} has {len(copy.files)} files")
    if copy.summaries > 1:
        report.duplicated.append(f"{where} has {copy.summaries} summaries")
    if copy.summaries < 1:
        report.lost.append(f"{where} has no summary")
    wanted = event.session if copy.destination == "labarchives" else stem_of(event)
    if wanted not in copy.title:
        report.problems.append(f"{where} should be called {wanted}")


def _check_links(
    findings: Findings, event: Announced, name: str, copies: Mapping[tuple[str, str], Sequence[Held]], cdcs: str
) -> None:
    """Each notebook's copy links to the record that CDCS itself holds."""
    records = copies.get((event.session, "cdcs"), ())
    wanted = {f"{cdcs}data?id={record.id}" for record in records}
    for copy in copies.get((event.session, name), ()):
        links = [link for link in copy.links if link.startswith(cdcs)]
        if not wanted or not wanted & set(links):
            findings.missing_links.append(f"session {event.session}: {name} {copy.id} has {copy.links}, not {wanted}")
        if set(links) - wanted:
            findings.report.problems.append(f"session {event.session}: {name} links to {links}, not to {wanted}")
        findings.repeated_links += max(0, len(links) - 1)


def _late_links(evidence: Evidence) -> int:
    """Count the successes of attempts that only added a link."""
    return sum(bool(row["success"]) and row["purpose"] == "link" for row in evidence.log)


def _check_steps(report: Report, database: Path) -> None:
    """Look at codes of finished steps: a link that could not be added leaves one."""
    query = "SELECT session, destination, error_code, reason FROM steps WHERE error_code IS NOT NULL"
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
        for session, destination, code, reason in connection.execute(query):
            report.problems.append(f"session {session}: {destination} has {code}: {reason}")
