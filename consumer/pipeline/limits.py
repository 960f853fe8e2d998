"""How many attempts at once a destination bears: learned from its answers, below the limit that is configured. Pure.

The rules follow Vector's adaptive concurrency: more by one when the limit was reached and nothing got slower, less by
a tenth on back-pressure (429, 503) or when answers take much longer. Two are our own, against its oscillation: the
limit doubles until the first back-pressure, and a limit that was refused is tried again only once in a while.
"""

import math
from dataclasses import dataclass, field

#: Weight of the newest window in what counts as usual.
NEWEST = 0.4
DECREASE = 0.9
#: Answers are slow when they take longer than usual by so many deviations, and by so much altogether.
DEVIATIONS = 2.5
SLOWER = 1.5
#: Below this nobody suffers, and what varies is this process rather than the destination.
SLOW_SECONDS = 0.25
#: After so many quiet windows a limit that was refused is tried again; each refusal doubles it.
PATIENCE_WINDOWS = 64
PATIENCE_MAX_WINDOWS = 4096


@dataclass(slots=True)
class _Usual:
    """Mean and variance of the windows before, the newest weighing most."""

    mean: float | None = None
    variance: float = 0.0

    def is_exceeded_by(self, seconds: float) -> bool:
        if self.mean is None:
            return False
        return seconds >= max(self.mean + DEVIATIONS * math.sqrt(self.variance), SLOWER * self.mean, SLOW_SECONDS)

    def add(self, seconds: float) -> None:
        if self.mean is None:
            self.mean = seconds
            return
        difference = seconds - self.mean
        self.mean += NEWEST * difference
        self.variance = (1 - NEWEST) * (self.variance + NEWEST * difference * difference)


@dataclass(slots=True)
class _Window:
    """What was seen since ``began``, in seconds of the monotonic clock."""

    began: float
    seconds: float = 0.0
    answers: int = 0
    reached: bool = False


@dataclass(slots=True)
class AdaptiveLimit:
    """The limit of one destination in this process; ``highest`` is what is configured.

    ``begin`` and ``end`` are told of each attempt, ``now`` being seconds of the monotonic clock.
    """

    highest: int
    limit: int = 1
    in_flight: int = 0
    _good: int = 1
    _ceiling: float = math.inf
    _doubling: bool = True
    _quiet: int = 0
    _patience: int = PATIENCE_WINDOWS
    _backed_off_at: float = -math.inf
    _usual: _Usual = field(default_factory=_Usual)
    _window: _Window | None = None

    @property
    def free(self) -> int:
        """Return how many attempts may begin now."""
        return max(0, self.limit - self.in_flight)

    def begin(self, now: float) -> None:
        """Count an attempt that begins."""
        self.in_flight += 1
        if self._window is None:
            self._window = _Window(now)
        self._window.reached |= self.in_flight >= self.limit

    def end(self, now: float, seconds: float, *, answered: bool, refused: bool) -> None:
        """Count an attempt that ended after ``seconds``.

        ``refused``: the destination asked for less (429, 503); ``answered``: its time says something of its load.
        """
        self.in_flight -= 1
        if refused:
            self._back_off(now, seconds)
            return
        window = self._window
        if window is None or not answered:
            return
        window.seconds += seconds
        window.answers += 1
        if now - window.began >= (self._usual.mean or seconds) and now - seconds >= self._backed_off_at:
            self._judge(window, now)

    def _judge(self, window: _Window, now: float) -> None:
        mean = window.seconds / window.answers
        slow = self._usual.is_exceeded_by(mean)
        self._usual.add(mean)
        self._window = _Window(now, reached=self.in_flight + 1 >= self.limit)
        if slow:
            self._lower(max(1, math.floor(self.limit * DECREASE)))
        elif window.reached:
            self._good = self.limit
            if self.limit > self._ceiling:  # what was refused is borne now
                self._ceiling = math.inf
            self._raise()

    def _raise(self) -> None:
        wished = self.limit * 2 if self._doubling else self.limit + 1
        if wished > self._ceiling:
            self._quiet += 1
            if self._quiet < self._patience:
                return
            self._quiet = 0
        self.limit = min(self.highest, wished)

    def _back_off(self, now: float, seconds: float) -> None:
        if now - seconds < self._backed_off_at:
            return  # it began before the limit was lowered: the same back-pressure
        self._backed_off_at = now
        refused_again = self.limit > self._ceiling
        self._patience = min(PATIENCE_MAX_WINDOWS, self._patience * 2) if refused_again else PATIENCE_WINDOWS
        if self._doubling:
            self._ceiling = math.inf  # somewhere between the last good limit and this one
            self._lower(self._good)
            return
        self._ceiling = min(self._good, self.limit - 1) if self.limit > 1 else 1
        lower = self._good if refused_again or self._good == self.limit - 1 else math.floor(self.limit * DECREASE)
        self._lower(max(1, min(lower, self.limit - 1)))

    def _lower(self, limit: int) -> None:
        self.limit = limit
        self._good = min(self._good, limit)
        self._doubling = False
        self._quiet = 0
        self._window = None
