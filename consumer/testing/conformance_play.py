"""The engine's part, played by the engine's own rules: attempts, look-ups, the settle rule, the last look-up.

Only time is shorter than in the service (H is a second or so, no backoff), and whatever waits for a person (a wrong
token, a refused record) is mended at once and goes on.
"""

import asyncio
import inspect
import random
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from consumer.destinations.contract import Absent, Answer, ExportContext, ExportResult, LastExport, Partial, Present
from consumer.errors import DestinationError, Misconfigured, Permanent, Transient, UnknownOutcome
from consumer.pipeline.attempt import Caller, Declined
from consumer.pipeline.retry import Facts, Policy, judge, surely_absent
from consumer.store.rows import StepState
from consumer.testing.conformance_subject import Record, Subject, make_context
from consumer.testing.faults import Seen

ROUNDS = 10
PAUSE_SECONDS = 0.15
#: How often the last look-up is repeated where it is not answered.
LAST_LOOKS = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a case; ``kind`` is class, time, duplicate, loss, secret, verify, memory or kit."""

    kind: str
    text: str


@dataclass
class Attempt:
    """One call of the destination and what came of it; ``wish_seconds`` is the wait that the server asked for."""

    seen: Seen
    value: Any
    seconds: float
    wish_seconds: float = 0.0


@dataclass
class Journey:
    """One record on its way; ``problems`` collects what goes wrong."""

    subject: Subject
    record: Record
    url: str
    problems: list[Problem] = field(default_factory=list)
    said: list[Any] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    result: LastExport | None = None
    attempts: int = 0
    copies: int | None = None
    unknown_since: datetime | None = None

    def __post_init__(self) -> None:
        self._registered = self.subject.build(self.url)
        self._caller = Caller(self._registered)
        self._began = self._last_request = datetime.now(UTC)
        self._draw = random.Random(7)  # noqa: S311 - jitter, not a secret

    async def close(self) -> None:
        """Let the destination close its connections."""
        self._caller.close()
        aclose = getattr(self._registered.plugin, "aclose", None)
        if inspect.iscoroutinefunction(aclose):
            await aclose()

    @property
    def policy(self) -> Policy:
        """Return the destination's bounds as the engine sees them."""
        return Policy(
            base_seconds=0.01,
            settle_seconds=self._registered.lane.settle_seconds,
            can_verify=self._registered.can_verify,
        )

    def context(self) -> ExportContext:
        """Return what the next call gets."""
        return make_context(self.record, self.subject.name, self.result, self.kept)

    # --- calls ---

    async def export(self, limit_seconds: float | None = None) -> Attempt:
        """Call ``export`` once, with the attempt's limit or, where nothing stalls, with far more time."""
        self.attempts += 1
        self._limit(limit_seconds)
        began = time.monotonic()
        try:
            ending = await self._caller.export(self.context())
        finally:
            self._last_request = datetime.now(UTC)
        seconds = time.monotonic() - began
        self.said.append(ending)
        if isinstance(ending, Declined):
            return Attempt(Seen.PERMANENT, ending, seconds)
        verdict = judge(ending, self._facts(), self.policy, self._draw)
        wish = (verdict.not_before - datetime.now(UTC)).total_seconds() if verdict.not_before else 0.0
        seen = _seen(ending)
        if seen is Seen.UNKNOWN:
            self.unknown_since = self._last_request
        if isinstance(ending, ExportResult) and ending.success:
            self._succeed(ending.record_id, ending.record_url, ending.stored_sha256)
        return Attempt(seen, ending, seconds, round(max(0.0, wish), 1))

    async def look(self, limit_seconds: float | None = None, *, recheck: bool = False) -> Attempt:
        """Call ``verify`` once, with a limit as ``export`` has."""
        self._limit(limit_seconds)
        context = self.context()
        if recheck:
            context.purpose = "recheck"
        began = time.monotonic()
        answer = await self._caller.verify(context)
        self.said.append(answer)
        return Attempt(_seen(answer), answer, time.monotonic() - began)

    def _limit(self, seconds: float | None) -> None:
        lane = replace(self._registered.lane, timeout_seconds=seconds or self.subject.options.patience_seconds)
        self._caller.destination = replace(self._registered, lane=lane)

    # --- until it is over ---

    async def finish(self, attempt: Attempt) -> None:
        """Go on from an attempt until the record is there for certain, then look once more and count."""
        for _ in range(ROUNDS):
            if await self._is_over(attempt):
                break
            attempt = await self.export()
        else:
            self.problems.append(Problem("loss", f"not exported after {ROUNDS} attempts: {short(attempt.value)}"))
            return
        await self._last_look()

    async def cut(self) -> Attempt:
        """Return what the engine makes of an attempt that was cancelled: unknown."""
        self.unknown_since = self._last_request = datetime.now(UTC)
        return Attempt(Seen.UNKNOWN, UnknownOutcome("cancelled", code="interrupted"), 0.0)

    async def _is_over(self, attempt: Attempt) -> bool:
        """Tell whether the record is there; else the next attempt may begin."""
        if attempt.seen is not Seen.UNKNOWN:
            return attempt.seen is Seen.SUCCESS
        if not self._registered.can_verify:
            return await self._person_decides()
        return await self.settle()

    async def settle(self) -> bool:
        """Look until the record is found (True) or may be sent again (False)."""
        until = time.monotonic() + 4 * self.policy.settle_seconds + self.subject.options.patience_seconds
        while time.monotonic() < until:
            asked_at = datetime.now(UTC)
            found = self.judge_look((await self.look()).value, asked_at)
            if found is not None:
                return found
            await asyncio.sleep(PAUSE_SECONDS)
        self.problems.append(Problem("verify", f"no look-up was answered: {short(self.said[-1])}"))
        return False

    def judge_look(self, answer: Answer | DestinationError, asked_at: datetime) -> bool | None:
        """Say what a look-up means: there (True), may be sent again (False), or ask again (None)."""
        if isinstance(answer, Present):
            self._succeed(answer.id, answer.url, None)
            return True
        if isinstance(answer, Partial):
            self.kept["record_id"] = answer.id
        if not isinstance(answer, Absent | Partial):
            return None  # a step that failed for good is replayed by a person, and is looked for first too
        last, draw = self._last_request, self._draw
        verdict = surely_absent(self._facts(), self.policy, last, draw, asked_at=asked_at)
        return False if verdict.state is StepState.DUE else None

    async def _person_decides(self) -> bool:
        """Let somebody look at the server, for a destination that cannot be asked; wait out H first."""
        if self.subject.count is None:
            self.problems.append(Problem("verify", "no verify and nothing to count with: nobody can tell"))
            return True
        await asyncio.sleep(self.policy.settle_seconds)
        return await self._count() > 0

    async def _last_look(self) -> None:
        """Look H later as the service does, and let the server's own books be read."""
        if self.unknown_since is not None:
            left = self.policy.settle_seconds - (datetime.now(UTC) - self.unknown_since).total_seconds()
            await asyncio.sleep(max(0.0, left) + PAUSE_SECONDS)
        if self._registered.can_verify:
            await self._last_look_up()
        if self.subject.count is not None:
            copies = await self._count()
            if copies != 1:
                kind = "duplicate" if copies > 1 else "loss"
                self.problems.append(Problem(kind, f"the server has {copies} copies"))

    async def _last_look_up(self) -> None:
        for _ in range(LAST_LOOKS):
            answer = (await self.look(recheck=True)).value
            if isinstance(answer, Present):
                break
            await asyncio.sleep(PAUSE_SECONDS)
        known = self.result.record_id if self.result else None
        if not isinstance(answer, Present):
            self.problems.append(Problem("loss", f"the last look-up found {short(answer)}"))
        elif answer.surplus:
            self.problems.append(Problem("duplicate", f"the last look-up found {answer.surplus} besides {answer.id}"))
        elif known is not None and answer.id != known:
            self.problems.append(Problem("class", f"the outcome named {known!r}, the copy is {answer.id!r}"))

    async def _count(self) -> int:
        if self.subject.count is None:
            return 0
        self.copies = await self.subject.count(self.record.probe(self.subject.name))
        return self.copies

    def _succeed(self, record_id: str | None, url: str | None, stored: str | None) -> None:
        sha256 = self.record.sha256
        self.result = LastExport(record_id or "", url, sha256, stored or sha256)

    def _facts(self) -> Facts:
        return Facts(self.attempts, 0, self._began, datetime.now(UTC))


def _seen(value: Any) -> Seen:
    """Name an ending or an answer."""
    if isinstance(value, ExportResult):
        return Seen.SUCCESS if value.success else Seen.TRANSIENT
    for kind, seen in (
        (Misconfigured, Seen.MISCONFIGURED),
        (Permanent, Seen.PERMANENT),
        (UnknownOutcome, Seen.UNKNOWN),
        (Transient, Seen.TRANSIENT),
        (Present, Seen.PRESENT),
        (Partial, Seen.PARTIAL),
        (Absent, Seen.ABSENT),
    ):
        if isinstance(value, kind):
            return seen
    return Seen.TRANSIENT if isinstance(value, DestinationError) else Seen.UNSURE


def short(value: Any) -> str:
    """Describe an ending or an answer in a line."""
    text = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else repr(value)
    return text if len(text) <= 200 else text[:199] + "…"  # noqa: PLR2004 - one line of a table
