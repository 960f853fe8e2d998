"""Rows and events for tests that need some; every value may be given, the rest is ordinary."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from consumer.destinations.registry import Lane, Registered
from consumer.events import BuiltEvent, parse_built
from consumer.store.rows import Claim, CopyRow, JobRow, JobState, StepRow, StepState

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
SHA = "ab" * 32


def record(**changes: Any) -> dict[str, Any]:
    return {"path": "2026/titan.xml", "sha256": SHA, "size": 7, **changes}


def document(data: dict[str, Any] | None = None, **envelope: Any) -> dict[str, Any]:
    """Return a structured record.built; ``data`` is added to what is required."""
    return {
        "specversion": "1.0",
        "id": "event-1",
        "source": "urn:test:builder",
        "type": "record.built",
        "time": "2026-11-24T11:00:00Z",
        "data": {"session_identifier": "session-1", "record": record(), **(data or {})},
        **envelope,
    }


def built(data: dict[str, Any] | None = None, **envelope: Any) -> BuiltEvent:
    body = json.dumps(document(data, **envelope)).encode()
    return parse_built(body, content_type="application/cloudevents+json", headers={})


def job_row(event: BuiltEvent | None = None, **changes: Any) -> JobRow:
    event = event or built()
    values: dict[str, Any] = {
        "id": event.job_id,
        "source": event.source,
        "event_id": event.id,
        "session": event.data.session_identifier,
        "build_time": event.time or NOW,
        "received_at": NOW,
        "snapshot_since": NOW,
        "event": event.text,
        "strategy": "all",
        "state": JobState.OPEN,
        "revision": 1,
        "superseded_by": None,
        "record_sha256": SHA,
        "record_name": "titan.xml",
        "facts": {},
    }
    return JobRow(**{**values, **changes})


def step_row(destination: str, state: StepState, job: JobRow | None = None, **changes: Any) -> StepRow:
    job = job or job_row()
    values: dict[str, Any] = {
        "job_id": job.id,
        "destination": destination,
        "session": job.session,
        "priority": 100,
        "purpose": "create",
        "state": state,
        "attempts": 0,
        "lookups": 0,
        "due_since": None,
        "next_attempt_at": None,
        "first_attempt_at": None,
        "last_request_at": None,
        "error_code": None,
        "reason": None,
        "result": None,
    }
    return StepRow(**{**values, **changes})


def claim(step: StepRow | None = None, job: JobRow | None = None, **changes: Any) -> Claim:
    job = job or job_row()
    values: dict[str, Any] = {
        "step": step or step_row("cdcs", StepState.RUNNING, job, due_since=NOW),
        "job": job,
        "copy": CopyRow(),
        "fence": 1,
        "lease_until": NOW + timedelta(minutes=3),
        "siblings": (),
    }
    return Claim(**{**values, **changes})


def registered(plugin: Any, **changes: Any) -> Registered:
    """Return a destination with a lane; ``changes`` are those of the lane."""
    lane: dict[str, Any] = {
        "concurrency": 2,
        "min_interval_seconds": 0.0,
        "timeout_seconds": 2.0,
        "settle_seconds": 120.0,
        "max_attempts": 5,
    }
    return Registered(getattr(plugin, "name", "cdcs"), 100, plugin, Lane(**{**lane, **changes}), "test")


@contextmanager
def folder_of_another_user() -> Iterator[tuple[Path, Callable[[], AbstractContextManager[None]]]]:
    """Give a folder with ``a.xml`` and ``closed/`` that nobody may read, and a way to be nobody for a while."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "a.xml").touch(mode=0o000)
        (folder / "closed").mkdir(mode=0o000)
        yield folder, _nobody


@contextmanager
def _nobody() -> Iterator[None]:
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)
