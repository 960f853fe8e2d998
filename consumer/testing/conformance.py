"""The conformance kit: forty wire faults between a destination and its server, and what must be true after each.

A fault passes when, wherever it strikes, the attempt ended in a class that the table allows, in time, with no secret
told, and when in the end exactly one right copy is there.
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from consumer.testing.conformance_cases import Bench, Case, Done, Shape, plan
from consumer.testing.conformance_play import Problem
from consumer.testing.conformance_subject import Subject
from consumer.testing.conformance_watch import Secrets
from consumer.testing.conformance_wire import Proxy
from consumer.testing.faults import FAULTS, Seen

#: Each mark of the grade, and the kinds of problems that take it away.
GRADES = {
    "idempotent": {"duplicate"},
    "verifiable": {"verify"},
    "resumable": {"loss"},
    "cancel-safe": set(),
    "bounded": {"time", "memory"},
    "secret-clean": {"secret"},
}


@dataclass(frozen=True, slots=True)
class Report:
    """What a proof found; ``faults`` are the names in the order of the table."""

    destination: str
    faults: tuple[str, ...]
    cases: tuple[Done, ...]
    others: tuple[Done, ...]
    can_verify: bool = True
    requests: tuple[str, ...] = ()

    @property
    def passed(self) -> tuple[str, ...]:
        """Return the faults that every case of them passed."""
        failed = {case.fault for case in self.cases if case.problems}
        ran = {case.fault for case in self.cases}
        return tuple(name for name in self.faults if name in ran and name not in failed)

    @property
    def score(self) -> str:
        """Return faults passed of faults there are."""
        return f"{len(self.passed)}/{len(self.faults)}"

    @property
    def grades(self) -> dict[str, bool]:
        """Return each mark and whether it was earned."""
        kinds = {problem.kind for case in self._all for problem in case.problems}
        marks = {name: not kinds & taken_by for name, taken_by in GRADES.items()}
        marks["verifiable"] &= self.can_verify
        marks["cancel-safe"] = not any(case.problems for case in self._all if case.name.startswith(("cut", "killed")))
        return marks

    @property
    def good(self) -> bool:
        """Tell whether all is as it must be."""
        return len(self.passed) == len(self.faults) and all(self.grades.values()) and not self.problems

    @property
    def problems(self) -> list[tuple[str, Problem]]:
        """Return every problem with the name of its case."""
        return [(case.name, problem) for case in self._all for problem in case.problems]

    def count(self, kind: str) -> int:
        """Return how many cases had a problem of a kind."""
        return sum(any(problem.kind == kind for problem in case.problems) for case in self._all)

    @property
    def _all(self) -> tuple[Done, ...]:
        return (*self.others, *self.cases)

    def as_json(self) -> dict[str, Any]:
        """Return everything for programs."""
        return {
            "destination": self.destination,
            "passed": len(self.passed),
            "faults": len(self.faults),
            "good": self.good,
            "grades": self.grades,
            "duplicates": self.count("duplicate"),
            "losses": self.count("loss"),
            "requests": list(self.requests),
            "cases": [asdict(case) for case in self._all],
        }


Tell = Callable[[str], None]


async def prove(subject: Subject, tell: Tell = lambda _line: None) -> Report:
    """Run every case against the subject's server; ``tell`` hears how far it is."""
    secrets = Secrets(subject.secrets)
    with tempfile.TemporaryDirectory(prefix="nexus-conformance-") as folder, secrets.watched_logs():
        async with Proxy() as proxy:
            bench = Bench(subject, proxy, secrets, Path(folder))
            first = await bench.clean()
            if first.ending != Seen.SUCCESS:
                return Report(subject.name, fault_names(subject), (), (first,), subject.registered.can_verify)
            shape = await bench.learn()
            tell(f"{subject.name}: {_told(shape)}")
            return await _run(bench, shape, first, tell)


async def _run(bench: Bench, shape: Shape, first: Done, tell: Tell) -> Report:
    subject = bench.subject
    cases = list(plan(shape, subject.options.only))

    def struck(case: Case) -> Callable[[], Awaitable[Done]]:
        return lambda: bench.strike(case, shape)

    def cut(name: str, strike: Any, seconds: float) -> Callable[[], Awaitable[Done]]:
        return lambda: bench.cut(name, strike, seconds)

    ran = await _at_once([struck(case) for case in cases], subject.options.parallel)
    cuts = [] if _is_plain(subject) else [cut(*item) for item in bench.cuts(shape)]
    others = await _at_once(cuts, subject.options.parallel)
    tell(f"{subject.name}: {len(ran)} cases of faults and {len(others)} cuts over")
    requests = tuple(f"{request.kind} {request.method} {request.path}" for request in shape.export)
    names = fault_names(subject)
    return Report(subject.name, names, tuple(ran), (first, *others), subject.registered.can_verify, requests)


def fault_names(subject: Subject) -> tuple[str, ...]:
    """Return the faults of this proof."""
    only = subject.options.only
    return tuple(fault.name for fault in FAULTS if not only or fault.name in only)


async def _at_once(works: Iterable[Callable[[], Awaitable[Done]]], parallel: int) -> list[Done]:
    """Run cases, so many at once."""
    gate = asyncio.Semaphore(parallel)

    async def one(work: Callable[[], Awaitable[Done]]) -> Done:
        async with gate:
            return await work()

    return list(await asyncio.gather(*(one(work) for work in works)))


def _is_plain(subject: Subject) -> bool:
    """Tell whether ``export`` runs in a thread, which nothing can cancel: it is only given up."""
    return not asyncio.iscoroutinefunction(subject.registered.plugin.export)


def _told(shape: Shape) -> str:
    kinds = [request.kind for request in shape.export]
    updates = sum(request.kind == "write" for request in shape.update)
    return (
        f"an export makes {kinds.count('write')} requests that change something and {kinds.count('read')} that read, "
        f"a look-up {len(shape.look)}, an update changes something {updates} times"
    )
