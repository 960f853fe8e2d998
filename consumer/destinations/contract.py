"""What a destination gets, what it gives back, and what it may raise.

Any class with ``name``, ``priority``, ``enabled``, ``validate_config()`` and ``export(context)`` is a destination;
the fields and helpers of ``ExportContext`` and ``ExportResult`` are those of NexusLIMS 2.8.0, so its plugins run
here. ``export`` may be ``async`` or plain (then it runs in a thread). It returns an ``ExportResult`` or raises
``Transient``, ``Permanent``, ``UnknownOutcome`` or ``Misconfigured`` from ``nexus_export``.

Optional: ``verify(context)`` -> ``Present``, ``Partial``, ``Absent`` or ``Unsure``; ``accepts(context)`` -> bool;
``links_to`` and ``depends_on`` (names); ``limits``; ``timeout_seconds``; ``settle_seconds``; and a pydantic model
``Settings``, read from ``NX_<NAME>_*`` and given to the constructor.
"""

import math
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

#: End of the attempt under way, in seconds of the monotonic clock: later, another process may have taken over.
no_request_after: ContextVar[float] = ContextVar("no_request_after", default=math.inf)


async def at_once() -> None:
    """Stand in where no pace is kept (a destination called by hand)."""


#: Awaited before each request by a destination with ``paces_requests = True``: waits for its turn among all
#: processes, ``min_interval_seconds`` after the one before. Other paced destinations have whole attempts spaced.
request_turn: ContextVar[Callable[[], Awaitable[None]]] = ContextVar("request_turn", default=at_once)

Action = Literal["created", "updated", "unchanged", "linked", "none"]


@dataclass
class ExportResult:
    """Result of one export attempt; ``record_id`` and ``record_url`` say where the record lies."""

    success: bool
    destination_name: str
    record_id: str | None = None
    record_url: str | None = None
    error_message: str | None = None
    timestamp: datetime = field(default_factory=lambda: datetime.now(UTC))
    metadata: dict[str, Any] = field(default_factory=dict)
    action: Action | None = None
    #: sha256 of the content as the server stored it, where the server stores something else than was sent
    stored_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Present:
    """The record is there, complete, and ours; ``surplus`` are the ids of further live copies of ours."""

    id: str
    url: str | None = None
    surplus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Partial:
    """Something of ours is there, but not all of it: ``export`` goes on from it, once the server has settled."""

    id: str


@dataclass(frozen=True, slots=True)
class Absent:
    """Nothing is there, and the answer can be trusted."""


@dataclass(frozen=True, slots=True)
class Unsure:
    """The question could not be answered."""

    reason: str = ""


Answer = Present | Partial | Absent | Unsure


@dataclass(frozen=True, slots=True)
class LastExport:
    """What we last wrote at this destination for this session; hashes are sha256 of the content."""

    record_id: str
    record_url: str | None
    sent_sha256: str | None
    stored_sha256: str | None


@dataclass(frozen=True, slots=True)
class Limits:
    """Defaults of a destination's lane: attempts at once, least seconds between two, attempts a step."""

    concurrency: int = 8
    min_interval_seconds: float = 0.0
    max_attempts: int = 25


async def _forget(_facts: Mapping[str, Any]) -> None:
    """Stand in where nothing is remembered (a context built by hand)."""


@dataclass
class ExportContext:
    """One record on its way to one destination.

    ``purpose`` is ``create``, ``update``, ``link`` or, for the last look-up after a success that followed an unknown
    outcome, ``recheck``: ``verify`` then also looks for surplus copies.

    ``links`` are the addresses of this session's copies at the destinations named in ``links_to``, as far as they
    are known. One that becomes known only after the export brings another call of ``export`` with the purpose
    ``link``: the copy is there and gets the links it lacks, and nothing else of it changes. ``verify`` answers
    ``Partial`` for a copy without them.

    ``record_key`` is the same for every attempt, job and build of (session, destination): a key to look up by.
    ``remembered`` survives attempts and jobs; ``await remember(page="17")`` adds to it and is durable when it
    returns.
    """

    xml_file_path: Path
    session_identifier: str
    instrument_pid: str
    dt_from: datetime
    dt_to: datetime
    user: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    previous_results: dict[str, ExportResult] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    activities: list[Any] = field(default_factory=list)
    reservation_event: Any = None
    record_key: str = ""
    record_sha256: str = ""
    purpose: str = "create"
    last_export: LastExport | None = None
    remembered: dict[str, Any] = field(default_factory=dict)
    save_facts: Callable[[Mapping[str, Any]], Awaitable[None]] = field(default=_forget, repr=False)
    #: every sha256 that was ever sent for this session here; a hit with other bytes is somebody else's
    sent_hashes: frozenset[str] = frozenset()

    def get_result(self, destination_name: str) -> ExportResult | None:
        """Return the result of a destination that has run before, or None."""
        return self.previous_results.get(destination_name)

    def add_result(self, destination_name: str, result: ExportResult) -> None:
        """Add or replace the result of a destination."""
        self.previous_results[destination_name] = result

    def has_successful_export(self, destination_name: str) -> bool:
        """Tell whether a destination has run before and succeeded."""
        result = self.get_result(destination_name)
        return result is not None and result.success

    async def remember(self, **facts: Any) -> None:
        """Keep facts for later attempts; when this returns they survive a crash."""
        self.remembered.update(facts)
        await self.save_facts(facts)


@runtime_checkable
class Destination(Protocol):
    """The part of the contract that every destination has."""

    name: str
    priority: int

    @property
    def enabled(self) -> bool:
        """Tell whether the settings say that records should go here."""
        ...

    def validate_config(self) -> Any:
        """Check settings and connection: ``(True, None)`` or ``(False, "what is wrong")``; may be async."""
        ...

    def export(self, context: ExportContext) -> Any:
        """Bring the record to the destination; may be async."""
        ...
