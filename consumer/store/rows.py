"""States and frozen rows that the store gives and takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any
from uuid import UUID


class JobState(StrEnum):
    """A job is one accepted event."""

    OPEN = "open"
    EXPORTED = "exported"
    FAILED = "failed"
    SUPERSEDED = "superseded"


class StepState(StrEnum):
    """A step is one destination of one job."""

    BLOCKED = "blocked"
    DUE = "due"
    RUNNING = "running"
    UNSETTLED = "unsettled"
    UNCERTAIN = "uncertain"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"
    SUPERSEDED = "superseded"

    @property
    def terminal(self) -> bool:
        """Tell whether nothing more happens to the step by itself."""
        return self in TERMINAL

    @property
    def in_flight(self) -> bool:
        """Tell whether an effect may be on its way."""
        return self in {StepState.RUNNING, StepState.UNSETTLED}


TERMINAL = frozenset(
    {
        StepState.UNCERTAIN,
        StepState.DONE,
        StepState.FAILED,
        StepState.SKIPPED,
        StepState.SUPERSEDED,
    }
)


class LaneState(StrEnum):
    """A lane is all work for one destination: active, open (breaker) or paused (misconfigured)."""

    ACTIVE = "active"
    OPEN = "open"
    PAUSED = "paused"


#: Purpose of a step that adds links to a finished copy.
LINK = "link"
#: Its error code when a link could not be added: the record itself is exported.
LINK_FAILED = "link_failed"

#: Conversions of job ids: each record needs them a dozen times, and Python's own are slow.
uuid_of = lru_cache(maxsize=2048)(UUID)
text_of = lru_cache(maxsize=2048)(UUID.__str__)


@dataclass(frozen=True, slots=True)
class NewStep:
    """A destination that a new job wants."""

    destination: str
    priority: int


@dataclass(frozen=True, slots=True)
class NewJob:
    """An accepted event on its way into the store."""

    id: UUID
    source: str
    event_id: str
    data_sha256: str
    session: str
    build_time: datetime
    event: str
    strategy: str
    steps: tuple[NewStep, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """A message for the outbox. ``exchange`` empty: straight to the queue named by ``routing_key``."""

    kind: str
    message_id: str
    exchange: str
    routing_key: str
    body: bytes
    headers: dict[str, Any] = field(default_factory=dict)
    content_type: str = "application/cloudevents+json"
    job_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as stored; ``facts`` are what the record itself says (instrument, times, user)."""

    id: UUID
    source: str
    event_id: str
    session: str
    build_time: datetime
    received_at: datetime
    snapshot_since: datetime
    event: str
    strategy: str
    state: JobState
    revision: int
    superseded_by: UUID | None
    record_sha256: str | None
    record_name: str | None
    facts: dict[str, Any]
    snapshot_tries: int = 0
    #: its steps if the job was just inserted: all blocked, so nobody has to load them
    new_steps: tuple[NewStep, ...] = ()


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step as stored; ``result`` is the destination's result once there is one."""

    job_id: UUID
    destination: str
    session: str
    priority: int
    purpose: str
    state: StepState
    attempts: int
    lookups: int
    due_since: datetime | None
    next_attempt_at: datetime | None
    first_attempt_at: datetime | None
    last_request_at: datetime | None
    error_code: str | None
    reason: str | None
    result: dict[str, Any] | None

    @property
    def links(self) -> bool:
        """Tell whether the record is exported and the step only adds links to its copy."""
        return self.purpose == LINK

    @property
    def outcome_state(self) -> StepState:
        """Return the state that strategy and outcome see: a late link changes neither."""
        return StepState.DONE if self.links else self.state


@dataclass(frozen=True, slots=True)
class CopyRow:
    """What is known of our copy of a session at a destination."""

    record_id: str | None = None
    record_url: str | None = None
    sent_sha256: str | None = None
    stored_sha256: str | None = None
    build_time: datetime | None = None
    remembered: dict[str, Any] = field(default_factory=dict)
    fence: int = 0
    links_sha256: str | None = None
    #: last moment at which a request can have left whose outcome nobody could find out
    unresolved_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class LaneRow:
    """The state of a destination's lane."""

    destination: str
    state: LaneState
    reason: str | None
    since: datetime | None
    not_before: datetime | None
    probe_at: datetime | None
    next_slot_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A step that this process runs now: with its job, its copy and what its siblings came to."""

    step: StepRow
    job: JobRow
    copy: CopyRow
    fence: int
    lease_until: datetime
    siblings: tuple[StepRow, ...]
    #: the same by this process's monotonic clock, in seconds: it goes on while the process is stopped
    held_until: float = math.inf
    #: when it was claimed, by the database's clock: what it asks, it asks later than that
    claimed_at: datetime | None = None
    #: since when its lane is open, if this attempt is the one that finds out whether that is over
    probe_of: datetime | None = None
    #: addresses of the copies that this one links to, by destination
    links: Mapping[str, str] = field(default_factory=dict)

    @property
    def looks_up(self) -> bool:
        """Tell whether the step must look before anything is sent."""
        return self.step.state is StepState.UNSETTLED


@dataclass(frozen=True, slots=True)
class StepChange:
    """What a finished attempt or a decision makes of a step."""

    job_id: UUID
    destination: str
    state: StepState
    error_code: str | None = None
    reason: str | None = None
    next_attempt_at: datetime | None = None
    result: dict[str, Any] | None = None
    counts: bool = False
    looked_up: bool = False


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One row of ``upload_log``: a finished attempt."""

    session: str
    destination: str
    success: bool
    timestamp: datetime
    record_id: str | None
    record_url: str | None
    error_message: str | None
    metadata: dict[str, Any]
    event_id: str
    source: str
    attempt: int
    error_code: str | None
    duration_seconds: float
    purpose: str


@dataclass(frozen=True, slots=True)
class CopyChange:
    """What an attempt learned of a copy; None leaves a field as it is."""

    record_id: str | None = None
    record_url: str | None = None
    sent_sha256: str | None = None
    stored_sha256: str | None = None
    build_time: datetime | None = None
    remembered: dict[str, Any] | None = None
    links_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class LaneChange:
    """A lane that pauses, or goes on."""

    destination: str
    state: LaneState
    reason: str | None = None
    not_before: datetime | None = None
    probe_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """All that T4 writes for one attempt; refused as a whole when the fence is not ours any more."""

    claim: Claim
    step: StepChange
    log: LogEntry | None
    copy: CopyChange | None = None
    lane: LaneChange | None = None
    #: when to look once more, if an outcome was unknown before; H after now for those that can be asked
    recheck_at: datetime | None = None
    #: for a step that ends uncertain: the last moment at which a request of it can have left
    unresolved_at: datetime | None = None
