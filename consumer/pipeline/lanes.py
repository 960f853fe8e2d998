"""One lane for each destination: how many attempts it bears, and whether it is well enough to be asked at all.

The limit lives in this process; whether a lane is active, open (breaker) or paused stands in the store, for all
processes and after a restart. Libraries were looked at: purgatory and aiolimiter keep their state in memory, and a
breaker that counts calls would count retries that are rows here.
"""

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import Enum, auto

from consumer.destinations.registry import Registered
from consumer.pipeline.attempt import Caller
from consumer.pipeline.limits import AdaptiveLimit
from consumer.pipeline.retry import PROBE_MAX_SECONDS, next_probe
from consumer.store.rows import AttemptEnd, Claim, LaneChange, LaneRow, LaneState, StepState
from consumer.store.steps import Wanted

#: A limit that is right by default; what is configured above it has to be borne first.
FIRST_LIMIT = 8
#: The breaker opens after so many failures in a row, and more than can be of one moment.
FAILURES_IN_A_ROW = 10
#: By then the store surely knows that a breaker has opened.
OPENING_SECONDS = 2.0
LONG_AGO = datetime.min.replace(tzinfo=UTC)
#: These say nothing of how much the destination bears: no answer came.
_NOT_ANSWERED = frozenset({"cannot_connect", "timeout", "busy", "no_answer", "interrupted", "internal_error"})


class Kind(Enum):
    """What an ending says of the destination."""

    WELL = auto()  # it answered, whatever it thought of the record
    REFUSED = auto()  # not now: it bears less
    FAILED = auto()  # nobody answered, or nobody knows what
    NOTHING = auto()  # it was not asked


def kind_of(end: AttemptEnd) -> Kind:
    """Read what an ending says of its destination."""
    step = end.step
    if end.lane is not None and end.lane.not_before is not None:
        return Kind.REFUSED
    if end.lane is not None or step.error_code in {"busy", "interrupted", "internal_error"}:
        return Kind.NOTHING
    if step.state.terminal and step.state is not StepState.UNCERTAIN and step.error_code != "exhausted":
        return Kind.WELL if step.error_code not in _NOT_ANSWERED else Kind.FAILED
    if step.state is StepState.DUE and step.counts:
        return Kind.FAILED if step.error_code in _NOT_ANSWERED else Kind.REFUSED
    if step.looked_up:
        return Kind.WELL if step.state is StepState.DUE else Kind.NOTHING
    return Kind.FAILED if step.counts else Kind.NOTHING


@dataclass(slots=True)
class Lane:
    """The work of one destination in this process."""

    caller: Caller
    limit: AdaptiveLimit
    lease_seconds: float
    longest_wait: timedelta
    failures: int = 0
    #: until then a breaker that has opened may not stand in the store yet
    _opens_until: datetime = LONG_AGO
    #: until then the store may not know yet that the destination wants no request
    _closed_until: datetime = LONG_AGO

    @classmethod
    def of(cls, caller: Caller, lease_margin_seconds: float, longest_wait_seconds: float) -> "Lane":
        """Return the lane of a destination."""
        settings = caller.destination.lane
        limit = AdaptiveLimit(settings.concurrency, min(settings.concurrency, FIRST_LIMIT))
        lease_seconds = settings.timeout_seconds + lease_margin_seconds
        return cls(caller, limit, lease_seconds, timedelta(seconds=longest_wait_seconds))

    @property
    def destination(self) -> Registered:
        """Return the destination."""
        return self.caller.destination

    @property
    def free(self) -> int:
        """Return how many attempts may begin; threads that hang keep their slot."""
        threads = self.destination.lane.concurrency - self.limit.in_flight - len(self.caller.hung)
        return max(0, min(self.limit.free, threads))

    def wanted(self, row: LaneRow | None, now: datetime) -> Wanted | None:
        """Say how much work may be claimed, given what the store knows of the lane."""
        soon = now + timedelta(seconds=OPENING_SECONDS)  # later ones are of a clock that was set back
        if now < self._closed_until <= soon:
            return None
        if now < self._opens_until <= soon and (row is None or row.state is LaneState.ACTIVE):
            return None
        slots = self.free
        spaced = self.destination.lane.min_interval_seconds > 0 and not self.destination.paces_requests
        probes = False
        if row is not None:
            waits = [moment for moment in (row.not_before, self._slot_of(row, now) if spaced else None) if moment]
            if any(now < moment <= now + self.longest_wait for moment in waits) or row.state is LaneState.PAUSED:
                return None
            if row.state is LaneState.OPEN:
                # later than any probe is booked: the clock was set back
                latest = now + timedelta(seconds=max(PROBE_MAX_SECONDS, self.lease_seconds))
                if row.probe_at is None or now < row.probe_at <= latest:
                    return None
                probes = True
        if slots <= 0:
            return None
        return Wanted(
            self.destination.name, 1 if spaced or probes else slots, self.lease_seconds,
            self.destination.can_verify, row.since if probes and row else None,
        )  # fmt: skip

    def _slot_of(self, row: LaneRow, now: datetime) -> datetime | None:
        """Return when the next attempt of a paced lane may start; one booked too far ahead is of a clock set back."""
        latest = now + timedelta(seconds=self.destination.lane.min_interval_seconds)
        return row.next_slot_at if row.next_slot_at and row.next_slot_at <= latest else None

    def begin(self) -> None:
        """Count an attempt that begins."""
        self.limit.begin(time.monotonic())

    def end(self, claim: Claim, end: AttemptEnd | None, seconds: float, now: datetime) -> AttemptEnd | None:
        """Count an attempt that ended; add what it means for the lane. ``now`` is the store's time."""
        kind = Kind.NOTHING if end is None else kind_of(end)
        if end is not None and end.lane is not None and end.lane.not_before is not None:
            self._closed_until = min(end.lane.not_before, now + timedelta(seconds=OPENING_SECONDS))
        self.limit.end(time.monotonic(), seconds, answered=kind is Kind.WELL, refused=kind is Kind.REFUSED)
        if end is None or kind is Kind.NOTHING:
            return end
        if kind is Kind.WELL:
            self.failures = 0
            closes = claim.probe_of is not None and end.lane is None
            return replace(end, lane=LaneChange(claim.step.destination, LaneState.ACTIVE)) if closes else end
        if end.lane is not None and claim.probe_of is not None and end.lane.not_before is not None:
            # it answers, and says itself when the next probe may come
            return replace(end, lane=replace(end.lane, state=LaneState.OPEN, probe_at=end.lane.not_before))
        if end.lane is not None:
            return end  # it said itself when to come again
        self.failures += 1
        enough = max(FAILURES_IN_A_ROW, self.limit.limit + 1)
        if claim.probe_of is None and self.failures < enough:
            return end
        return replace(end, lane=self._open(end, claim.probe_of, now))

    def _open(self, end: AttemptEnd, since: datetime | None, now: datetime) -> LaneChange:
        """Open the breaker, or keep it open after a probe (``since``: when it opened)."""
        why = end.step.reason or end.step.error_code
        reason = f"still: {why}" if since else f"{self.failures} failures in a row, the last: {why}"
        self.failures = 0
        self._opens_until = now + timedelta(seconds=OPENING_SECONDS)
        return LaneChange(self.destination.name, LaneState.OPEN, reason, None, next_probe(since or now, now))
