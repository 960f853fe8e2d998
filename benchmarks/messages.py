"""The two messages of the benchmark: the event that every consumer reads and the outcome the peers answer.

Both have the shape that consumers of this project really see, so nobody is measured with an easier message.
"""

import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from tools.records import Record

EXCHANGE = "nexuslims.records"
WORK_QUEUE = "nexuslims.export"
DEAD_QUEUE = "nexuslims.export.dead"
OUTCOME_QUEUE = "benchmark.outcomes"
BUILT = "record.built"
EXPORTED = "record.exported"
EXPORT_FAILED = "record.export_failed"
CONTENT_TYPE = "application/cloudevents+json"
PREFETCH = 256
URL_VARIABLE = "BENCHMARK_AMQP_URL"  # where a peer finds the broker

_MESSAGE_BYTES = 1_000
_SOURCE = "urn:benchmark"


@dataclass(frozen=True, slots=True)
class Built:
    """One ``record.built`` as it is published."""

    id: str
    body: bytes


def built(records: Sequence[Record]) -> list[Built]:
    """Announce every record by path, checksum and size, in messages of about 1 kB."""
    return [_announce(record) for record in records]


def _announce(record: Record) -> Built:
    event_id = str(uuid.uuid4())
    content = record.content
    metadata = {"note": ""}
    event = {
        "specversion": "1.0",
        "id": event_id,
        "source": _SOURCE,
        "type": BUILT,
        "subject": record.session,
        "time": "2026-01-15T12:00:00+00:00",
        "datacontenttype": "application/json",
        "data": {
            "session_identifier": record.session,
            "instrument_pid": record.instrument_pid,
            "user": record.user,
            "record": {
                "path": record.name,
                "sha256": hashlib.sha256(content).hexdigest(),
                "size": len(content),
            },
            "metadata": metadata,
        },
    }
    metadata["note"] = "x" * max(0, _MESSAGE_BYTES - len(json.dumps(event)))
    return Built(event_id, json.dumps(event).encode())


def outcome(body: bytes) -> bytes:
    """Answer an event as a consumer does that exported it to one destination: parse, look, write."""
    event = json.loads(body)
    data = event["data"]
    result = {
        "destination": "noop",
        "success": True,
        "skipped": False,
        "action": "created",
        "record_id": data["session_identifier"],
        "attempts": 1,
        "timestamp": event["time"],
        "metadata": {},
    }
    answer = {
        "specversion": "1.0",
        "id": str(uuid.uuid4()),
        "source": _SOURCE,
        "type": EXPORTED,
        "subject": data["session_identifier"],
        "time": event["time"],
        "datacontenttype": "application/json",
        "data": {
            "session_identifier": data["session_identifier"],
            "status": "COMPLETED",
            "revision": 1,
            "strategy": "all",
            "cause": {"source": event["source"], "id": event["id"]},
            "user": data["user"],
            "instrument_pid": data["instrument_pid"],
            "record": data["record"],
            "results": [result],
        },
    }
    return json.dumps(answer).encode()
