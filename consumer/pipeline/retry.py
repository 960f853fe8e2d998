"""Pure rules after an attempt: what its ending makes of the step, and how long to wait.

Full jitter after https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/ .
"""

import math
import random
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from consumer.destinations.contract import ExportResult
from consumer.errors import DestinationError, Misconfigured, Permanent, Transient, UnknownOutcome
from consumer.store.rows import StepState

#: A paused lane asks its destination again, soon at first, so that a mended token needs no command.
PROBE_MIN_SECONDS = 5.0
PROBE_MAX_SECONDS = 60.0

#: Look-ups after an unknown outcome: quick at first, then once in a while.
LOOKUP_BASE_SECONDS = 1.0
LOOKUP_MAX_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Policy:
    """Bounds of retries for one destination; ``settle_seconds`` is H, how late its server may still commit."""

    max_attempts: int = 25
    base_seconds: float = 5.0
    max_seconds: float = 3600.0
    max_wait_seconds: float = 7 * 86400.0
    settle_seconds: float = 120.0
    can_verify: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the step when its attempt ended; ``attempts`` counts this one."""

    attempts: int
    lookups: int
    due_since: datetime
    now: datetime


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the ending makes of the step (and of its lane, if ``pause`` or ``not_before`` is set)."""

    state: StepState
    error_code: str | None = None
    message: str | None = None
    next_attempt_at: datetime | None = None
    next_action: str = "none"
    counts: bool = True
    pause: bool = False
    not_before: datetime | None = None


Ending = ExportResult | DestinationError


def backoff_seconds(attempt: int, base: float, cap: float, draw: random.Random) -> float:
    """Draw a wait between 0 and ``base * 2 ** (attempt - 1)``, at most ``cap``."""
    return draw.uniform(0, min(cap, base * 2 ** min(attempt - 1, 60)))


def next_probe(since: datetime, now: datetime) -> datetime:
    """Say when a lane that is paused since a moment is probed next: the longer it lasts, the less often."""
    paused = (now - since).total_seconds()
    return now + timedelta(seconds=min(PROBE_MAX_SECONDS, max(PROBE_MIN_SECONDS, paused)))


def judge(ending: Ending, facts: Facts, policy: Policy, draw: random.Random) -> Verdict:
    """Turn the ending of an attempt into the step's next state."""
    if isinstance(ending, ExportResult):
        if ending.success:
            return Verdict(StepState.DONE)
        message = ending.error_message or "the destination reported a failure without a message"
        return _again(Transient(message, code="refused"), facts, policy, draw)
    message = str(ending)
    if isinstance(ending, Misconfigured):
        return _paused(ending, facts, policy)
    if isinstance(ending, Permanent):
        return Verdict(StepState.FAILED, ending.code, message, next_action=_advice(ending.code))
    if isinstance(ending, UnknownOutcome):
        return _unknown(ending, facts, policy, draw)
    transient = ending if isinstance(ending, Transient) else Transient(message, code=ending.code)
    return _again(transient, facts, policy, draw)


def still_unknown(facts: Facts, policy: Policy, draw: random.Random, message: str) -> Verdict:
    """Say when to look again while nobody can tell whether the request had its effect."""
    if _waited_too_long(facts, policy):
        return Verdict(StepState.UNCERTAIN, "uncertain", message, next_action="replay", counts=False)
    # half fixed, half drawn: look-ups of many records after one outage must not come in step
    bound = min(LOOKUP_MAX_SECONDS, LOOKUP_BASE_SECONDS * 2 ** min(facts.lookups, 16))
    pause = bound / 2 + draw.uniform(0, bound / 2)
    return Verdict(
        StepState.UNSETTLED, "unknown_outcome", message,
        next_attempt_at=facts.now + timedelta(seconds=pause), counts=False,
    )  # fmt: skip


def look_up_failed(error: DestinationError, facts: Facts, policy: Policy, draw: random.Random) -> Verdict:
    """Judge a look-up that raised: unless it was refused for good, the outcome is as unknown as it was."""
    if isinstance(error, Permanent):
        return Verdict(StepState.FAILED, error.code, str(error), next_action=_advice(error.code), counts=False)
    verdict = still_unknown(facts, policy, draw, str(error))
    if isinstance(error, Misconfigured):
        action = "fix_config" if verdict.state is StepState.UNSETTLED else verdict.next_action
        return replace(verdict, next_action=action, pause=True)
    return _not_before(verdict, _wished(error, facts.now, policy))


def surely_absent(
    facts: Facts, policy: Policy, last_request_at: datetime, draw: random.Random, *, asked_at: datetime | None = None
) -> Verdict:
    """After a look-up that missed something: it is sent again only H after the last request can have left.

    ``asked_at`` is when the look-up began, if that is not now: its answer may have taken long.
    """
    settled_at = last_request_at + timedelta(seconds=policy.settle_seconds)
    if (asked_at or facts.now) < settled_at:
        verdict = still_unknown(facts, policy, draw, "not there yet; the server may still commit")
        if verdict.state is not StepState.UNSETTLED or verdict.next_attempt_at is None:
            return verdict
        return Verdict(
            verdict.state, verdict.error_code, verdict.message,
            next_attempt_at=max(facts.now, min(verdict.next_attempt_at, settled_at)), counts=False,
        )  # fmt: skip
    if facts.attempts >= policy.max_attempts or _waited_too_long(facts, policy):
        return Verdict(
            StepState.FAILED, "exhausted", f"not there after {facts.attempts} attempts",
            next_action="replay", counts=False,
        )  # fmt: skip
    return Verdict(StepState.DUE, next_attempt_at=facts.now, counts=False)


def _again(error: Transient, facts: Facts, policy: Policy, draw: random.Random) -> Verdict:
    wished = _wished(error, facts.now, policy)
    if facts.attempts >= policy.max_attempts or _waited_too_long(facts, policy):
        message = f"{error} (given up after {facts.attempts} attempts)"
        return Verdict(StepState.FAILED, error.code, message, next_action="replay", not_before=wished)
    seconds = backoff_seconds(facts.attempts, policy.base_seconds, policy.max_seconds, draw)
    at = max(facts.now + timedelta(seconds=seconds), wished or facts.now)
    return Verdict(StepState.DUE, error.code, str(error), at, not_before=wished)


def _paused(error: Misconfigured, facts: Facts, policy: Policy) -> Verdict:
    if _waited_too_long(facts, policy):
        return Verdict(StepState.FAILED, error.code, str(error), next_action="fix_config")
    return Verdict(
        StepState.DUE, error.code, str(error), facts.now, next_action="fix_config", counts=False, pause=True
    )


def _unknown(error: UnknownOutcome, facts: Facts, policy: Policy, draw: random.Random) -> Verdict:
    wished = _wished(error, facts.now, policy)
    if policy.can_verify:
        verdict = still_unknown(facts, policy, draw, str(error))
        return _not_before(replace(verdict, error_code=error.code, counts=True), wished)
    message = f"{error} (this destination cannot be asked whether the record arrived)"
    return Verdict(StepState.UNCERTAIN, error.code, message, next_action="replay", not_before=wished)


def _not_before(verdict: Verdict, wished: datetime | None) -> Verdict:
    """Let a look-up, like all work of its destination, wait as long as the destination asks for."""
    at = verdict.next_attempt_at
    return replace(verdict, next_attempt_at=max(at, wished) if at and wished else at, not_before=wished)


def _wished(error: DestinationError, now: datetime, policy: Policy) -> datetime | None:
    """Take the server's wish, but never a longer one than the longest wait configured.

    A plugin may give anything; what is no time is no wish.
    """
    wish = getattr(error, "retry_after", None)
    if isinstance(wish, datetime):
        wish = (wish if wish.tzinfo else wish.astimezone()) - now
        wish = wish.total_seconds()
    if not isinstance(wish, int | float) or math.isnan(wish):
        return None
    return now + timedelta(seconds=min(max(0.0, wish), policy.max_wait_seconds))


def _waited_too_long(facts: Facts, policy: Policy) -> bool:
    return facts.now >= facts.due_since + timedelta(seconds=policy.max_wait_seconds)


#: Refusals that a person ends at the destination; nothing is wrong with the record.
_MENDED_THERE = frozenset(
    {"changed_at_destination", "conflict", "locked", "archived", "deleted", "too_large", "not_permitted"}
)


def _advice(code: str) -> str:
    return "replay" if code in _MENDED_THERE else "fix_record"
