"""The cases of a proof: each fault at each request that it can strike, cuts in the middle, and the clean way."""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from consumer.testing.conformance_play import Attempt, Journey, Problem, short
from consumer.testing.conformance_subject import Options, Subject, build_again, make_record
from consumer.testing.conformance_watch import Memory, Secrets, case_name, lines_of
from consumer.testing.conformance_wire import Proxy, Strike, Wire
from consumer.testing.conformance_wire import Seen as Request
from consumer.testing.disk_faults import DISK_FAULTS
from consumer.testing.faults import BY_NAME, FAULTS, Fault, Seen

MEMORY_BYTES = 400 * 1024**2
#: What a loaded machine may add to an attempt's limit.
SLACK_SECONDS = 1.0
_MOST_WRITES, _MOST_READS = 8, 6
_TRIES = 3
_HELD = ("late_commit", "slow_drip")
_NUMBERS = re.compile(r"[0-9a-fA-F]{8,}|\d+")


@dataclass(frozen=True, slots=True)
class Case:
    """One fault at one request: of a first export, of a look-up after it, or of the export of a newer build."""

    fault: Fault
    strike: Strike
    phase: Literal["export", "look", "update"]
    at: str

    @property
    def name(self) -> str:
        """Return a name for people and for log lines."""
        variant = f" ({self.strike.variant})" if self.strike.variant else ""
        return f"{self.fault.name}{variant} at {self.at}"

    def limit_seconds(self, options: Options) -> float:
        """Return the limit of the attempt or look-up that is struck."""
        return options.limit_seconds if self.fault.stalls else options.patience_seconds

    @property
    def expected(self) -> frozenset[Seen]:
        """Return the endings that are right."""
        if self.phase == "look":
            return self.fault.looks
        return self.fault.writes if self.strike.kind == "write" else self.fault.reads


@dataclass
class Done:
    """A case that is over."""

    name: str
    fault: str
    struck: str = ""
    ending: str = ""
    message: str = ""
    seconds: float = 0.0
    copies: int | None = None
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Shape:
    """The requests of a clean export, of a clean look-up and of the export of a newer build, in order."""

    export: Sequence[Request]
    look: Sequence[Request] = ()
    update: Sequence[Request] = ()
    seconds: float = 0.0


def plan(shape: Shape, only: Iterable[str] = ()) -> Iterator[Case]:
    """Yield every fault at every request where it means something."""
    wanted = set(only)
    for fault in FAULTS:
        if wanted and fault.name not in wanted:
            continue
        for variant in fault.variants:
            for kind, number, position, at in _places(shape.export):
                yield Case(fault, Strike(fault.name, variant, kind, number, position), "export", at)
            for _, _, position, at in _places(shape.look, kind="any"):
                strike = Strike(fault.name, variant, "any", position, position)
                yield Case(fault, strike, "look", f"look-up {at}")
            for kind, number, position, at in _places(shape.update):
                if kind == "write" and not fault.heavy:  # what it does to memory is measured before
                    strike = Strike(fault.name, variant, kind, number, position)
                    yield Case(fault, strike, "update", f"update {at}")


def _places(requests: Sequence[Request], kind: str = "") -> Iterator[tuple[str, int, int, str]]:
    """Yield (kind, number of its kind, position, description): all writes, of equal reads the first and the last."""
    numbers = {"read": 0, "write": 0}
    places: list[tuple[str, int, int, str]] = []
    for position, request in enumerate(requests, 1):
        numbers[request.kind] += 1
        shape = f"{request.method} {_NUMBERS.sub('#', request.path)}"
        places.append((kind or request.kind, numbers[request.kind], position, f"{position}: {shape}"))
    writes = [place for place in places if place[0] == "write"]
    reads = [place for place in places if place[0] != "write"]
    shapes = [place[3].partition(": ")[2] for place in reads]
    ends = [place for n, place in enumerate(reads) if shapes[n] not in shapes[:n] or shapes[n] not in shapes[n + 1 :]]
    yield from writes[:_MOST_WRITES]
    yield from ends[:_MOST_READS]


class Bench:
    """Runs cases against one subject."""

    def __init__(self, subject: Subject, proxy: Proxy, secrets: Secrets, folder: Path) -> None:
        self.subject = subject
        self._proxy = proxy
        self._secrets = secrets
        self._folder = folder
        self._memory = Memory()
        self._measuring = asyncio.Lock()
        self._reads = list(subject.options.reads)

    @asynccontextmanager
    async def _journey(self, done: Done) -> AsyncIterator[tuple[Journey, Wire]]:
        """Give a new record, a new instance and a new wire; what it said is searched for secrets at the end."""
        case_name.set(done.name)
        options = self.subject.options
        patterns = {"reads": self._reads, "creates": list(options.creates)}
        late = self.subject.registered.lane.settle_seconds / 2
        wire = await self._proxy.open(self.subject.server(), patterns, options.limit_seconds, late)
        record = make_record(self._folder, options.record)
        journey = Journey(self.subject, record, self.subject.through(wire.port), done.problems)
        try:
            yield journey, wire
        except Exception as error:  # noqa: BLE001 - a case that breaks must not take the others down
            done.problems.append(Problem("kit", short(error)))
        finally:
            await journey.close()
            _, trapped = await wire.ledger()
            await wire.close()
            done.copies = journey.copies
            self._search(done, journey, trapped)

    def _search(self, done: Done, journey: Journey, trapped: list[str]) -> None:
        if self._secrets.within(*journey.said):
            done.problems.append(Problem("secret", "a secret is in an error or a result"))
        if self._secrets.within(journey.kept):
            done.problems.append(Problem("secret", "a secret is among what is remembered"))
        if self._secrets.within(*trapped):
            done.problems.append(Problem("secret", "a secret followed the redirect to another host"))
        if done.name in self._secrets.leaks:
            names = lines_of(self._secrets.leaks[done.name])
            done.problems.append(Problem("secret", f"a secret is in a log line ({names})"))

    # --- the clean way ---

    async def clean(self) -> Done:
        """Look, export, look and export once more, without any fault."""
        done = Done("without faults", "")
        async with self._journey(done) as (journey, wire):
            if self.subject.registered.can_verify:
                await self._expect(done, journey, Seen.ABSENT, "before anything was sent")
            attempt = await journey.export()
            done.ending, done.seconds = attempt.seen, attempt.seconds
            if attempt.seen is not Seen.SUCCESS:
                done.problems.append(Problem("loss", f"the export without faults ended as {short(attempt.value)}"))
                return done
            await wire.mend()
            if self.subject.registered.can_verify:
                await self._expect(done, journey, Seen.PRESENT, "after the export")
            # whatever a look-up sends only reads, whatever its method
            look, _ = await wire.ledger()
            self._reads += [f"^{r.method} {re.escape(r.path)}$" for r in look if r.kind == "write"]
            again = await journey.export()
            if again.seen is not Seen.SUCCESS:
                done.problems.append(Problem("loss", f"a second export ended as {short(again.value)}"))
            await journey.finish(again)
        return done

    async def _expect(self, done: Done, journey: Journey, seen: Seen, when: str) -> None:
        look = await journey.look()
        if look.seen is not seen:
            text = f"verify answered {short(look.value)} {when}, {seen} would be right"
            done.problems.append(Problem("verify", text))

    async def learn(self) -> Shape:
        """Return the requests of exports, and of a look-up after one whose last answer was lost."""
        shape = Shape(())
        async with self._journey(Done("learning", "")) as (journey, wire):
            seconds = (await journey.export()).seconds
            export, _ = await wire.ledger()
            journey.record = build_again(journey.record)
            await wire.mend()
            await journey.export()
            update, _ = await wire.ledger()
            shape = Shape(export, (), update, seconds)
        if self.subject.registered.can_verify:
            async with self._journey(Done("learning", "")) as (journey, wire):
                await wire.arm(self._loss_of_last(shape))
                await journey.export()
                await wire.mend()
                await journey.look()
                look, _ = await wire.ledger()
                shape = replace(shape, look=look)
        return shape

    @staticmethod
    def _loss_of_last(shape: Shape) -> Strike:
        writes = sum(request.kind == "write" for request in shape.export)
        return Strike("lost_after_commit", "reset", "write", writes, len(shape.export))

    # --- faults ---

    async def strike(self, case: Case, shape: Shape) -> Done:
        """Run one case of a fault; again where a busy machine was too slow to get as far as the fault."""
        for _ in range(_TRIES - 1):
            done = await self._strike(case, shape)
            if done.struck or not case.fault.stalls:
                return done
        return await self._strike(case, shape)

    async def _strike(self, case: Case, shape: Shape) -> Done:
        done = Done(case.name, case.fault.name)
        async with self._journey(done) as (journey, wire):
            if case.phase == "update":
                await self._built_again(journey)
            if case.phase == "look":
                await self._struck_look(case, shape, journey, wire, done)
            else:
                await self._struck_export(case, journey, wire, done)
        return done

    @asynccontextmanager
    async def _measured(self, case: Case, done: Done) -> AsyncIterator[None]:
        """Measure the memory that a heavy answer takes; one at a time, so that each is measured alone."""
        if not case.fault.heavy:
            yield
            return
        async with self._measuring:
            self._memory.begin()
            yield
            risen = self._memory.risen()
        if risen > MEMORY_BYTES:
            done.problems.append(Problem("memory", f"memory rose by {risen // 1024**2} MiB"))

    async def _built_again(self, journey: Journey) -> None:
        """Export a record and build it again; the next export is an update."""
        first = await journey.export()
        if first.seen is not Seen.SUCCESS:
            journey.problems.append(Problem("kit", f"the export before the update ended as {short(first.value)}"))
        journey.record = build_again(journey.record)

    async def _struck_export(self, case: Case, journey: Journey, wire: Wire, done: Done) -> None:
        await wire.arm(case.strike)
        async with self._measured(case, done):
            attempt = await journey.export(case.limit_seconds(self.subject.options))
        if case.fault.name in _HELD:
            journey.unknown_since = datetime.now(UTC)  # whatever it says: something of it is still on its way
        await self._judge(case, attempt, wire, done)
        await wire.mend()
        await journey.finish(attempt)

    async def _struck_look(self, case: Case, shape: Shape, journey: Journey, wire: Wire, done: Done) -> None:
        """Lose the last answer of an export, wait until a look-up is believed, and strike that look-up."""
        await wire.arm(self._loss_of_last(shape))
        attempt = await journey.export()
        await asyncio.sleep(journey.policy.settle_seconds)
        await wire.arm(case.strike)
        asked_at = datetime.now(UTC)
        async with self._measured(case, done):
            look = await journey.look(case.limit_seconds(self.subject.options))
        await self._judge(case, look, wire, done)
        await wire.mend()
        if attempt.seen is Seen.UNKNOWN:
            found = journey.judge_look(look.value, asked_at)
            if found is None:
                found = await journey.settle()
            attempt = Attempt(Seen.SUCCESS, None, 0.0) if found else await journey.export()
        await journey.finish(attempt)

    async def _judge(self, case: Case, attempt: Attempt, wire: Wire, done: Done) -> None:
        done.ending, done.seconds, done.message = attempt.seen, round(attempt.seconds, 3), short(attempt.value)
        entries, _ = await wire.ledger()
        done.struck = " ".join(f"{entry.method} {entry.path}" for entry in entries if entry.struck)[:200]
        if not done.struck:
            done.problems.append(Problem("kit", "the fault struck nothing: the destination sent fewer requests"))
            return
        failed = [entry.failed for entry in entries if entry.failed]
        if failed:
            done.problems.append(Problem("kit", f"the server behind the proxy failed: {failed[0]}"))
        if attempt.seen not in case.expected and not _told(case, attempt):
            right = " or ".join(sorted(case.expected))
            text = f"{done.struck.strip()} was struck: {short(attempt.value)}; {right} would be right"
            done.problems.append(Problem("class", text))
        limit = case.limit_seconds(self.subject.options)
        if attempt.seconds > limit + SLACK_SECONDS:
            done.problems.append(Problem("time", f"took {attempt.seconds:.1f} s, at most {limit:.1f} s is right"))
        elif attempt.seconds > limit - SLACK_SECONDS and not case.fault.stalls:
            done.problems.append(Problem("time", f"ended only by its limit of {limit:g} s, though nothing stalled"))
        self._judge_wish(case, attempt, done)

    @staticmethod
    def _judge_wish(case: Case, attempt: Attempt, done: Done) -> None:
        bounds = case.fault.wish.get(case.strike.variant)
        if bounds is None or case.phase == "look" or attempt.seen in {Seen.SUCCESS, Seen.MISCONFIGURED}:
            return
        least, most = bounds
        if not least <= attempt.wish_seconds <= most:
            text = f"Retry-After was read as {attempt.wish_seconds:g} s, {least:g} to {most:g} would be right"
            done.problems.append(Problem("class", text))

    # --- cuts ---

    def cuts(self, shape: Shape) -> Iterator[tuple[str, Strike | None, float]]:
        """Yield (name, fault that holds the request, seconds): where an attempt is cancelled."""
        for kind, number, position, at in _places(shape.export):
            if kind == "write":
                for fault in _HELD:
                    yield f"cut in {fault} at {at}", Strike(fault, "", kind, number, position), 0.0
        draw = random.Random(7)  # noqa: S311 - repeatable moments, not a secret
        for number in range(self.subject.options.moments):
            seconds = draw.uniform(0, shape.seconds * 1.1)
            yield f"cut {number + 1} after {seconds * 1000:.0f} ms", None, seconds

    async def cut(self, name: str, strike: Strike | None, seconds: float) -> Done:
        """Cancel an attempt, at a moment or while one of its requests is held, and recover."""
        done = Done(name, "")
        async with self._journey(done) as (journey, wire):
            if strike is not None:
                await wire.arm(strike)
            task = asyncio.create_task(journey.export())
            if strike is None:
                await asyncio.wait({task}, timeout=seconds)
            else:
                await self._until_struck(task, wire)
            task.cancel()
            (ended,) = await asyncio.gather(task, return_exceptions=True)
            attempt = ended if isinstance(ended, Attempt) else await journey.cut()
            done.ending = attempt.seen
            await wire.mend()
            await journey.finish(attempt)
        return done

    async def _until_struck(self, task: asyncio.Task[Attempt], wire: Wire) -> None:
        until = time.monotonic() + self.subject.options.patience_seconds
        while not task.done() and time.monotonic() < until:
            entries, _ = await wire.ledger()
            if any(entry.struck for entry in entries):
                return
            await asyncio.sleep(0.02)


def _told(case: Case, attempt: Attempt) -> bool:
    """Tell whether a part was refused, left out, and said to be missing."""
    metadata = getattr(attempt.value, "metadata", {})
    return case.fault.refuses and attempt.seen is Seen.SUCCESS and bool(metadata.get("warning"))


def known_faults(names: Iterable[str]) -> list[str]:
    """Return the names that are no faults."""
    known = {*BY_NAME, *(fault.name for fault in DISK_FAULTS)}
    return [name for name in names if name not in known]
