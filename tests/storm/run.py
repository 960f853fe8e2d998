# ruff: noqa: T201 - this program talks to a person
"""Kill consumer and broker at random moments while records go to a misbehaving server, then look for damage."""

import argparse
import asyncio
import logging
import math
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.storm.check import Report, check, read_evidence, read_ledgers
from tests.storm.stage import Open, Stage, StormError
from tests.storm.traffic import Announced, Traffic, announce, queue_lengths
from tests.storm.world import DESTINATIONS, SETTLE_SECONDS, World

#: From the readiness of a consumer to the next kill, at most.
LONGEST_LIFE_SECONDS = 4.0
#: Some kills come while a consumer still starts: this share of them, within that time.
YOUNG_SHARE = 0.15
YOUNG_SECONDS = 1.2
BROKER_SHARE = 0.1
#: About how long a kill takes together with the life before it; sets the pace of publishing.
CYCLE_SECONDS = 3.5
READY_SECONDS = 40.0
TELL_SECONDS = 5.0
LOOK_SECONDS = 0.02


class Storm:
    """One run: traffic, kills, and the wait for the end of all work."""

    #: After the end nothing more may come for so long.
    quiet_seconds = SETTLE_SECONDS + 3.0

    def __init__(self, options: argparse.Namespace, world: Stage, traffic: Traffic) -> None:
        self._options = options
        self._world = world
        self._traffic = traffic
        self._rng = random.Random(f"{options.seed}:kills")  # noqa: S311 - has to be repeatable, not secret
        self._began = time.monotonic()
        self._ends_at = self._began + options.minutes * 60
        self._told_at = 0.0
        self.kills: Counter[str] = Counter()

    def run(self) -> None:
        """Kill as often as wanted, then wait until nothing is open."""
        self._let_publish()
        self._world.start_consumer()
        while self.kills.total() < self._options.kills:
            self._live_for_a_while()
            self._await_work()
            if self._rng.random() < BROKER_SHARE:
                self._count("broker")
                self._world.kill_broker()
            else:
                self._count("consumer")
                self._world.kill_consumer()
        self._await_end()

    def _count(self, what: str) -> None:
        self.kills[what] += 1
        self._let_publish()

    def _let_publish(self) -> None:
        """Spread the records over the kills, and keep some back, so that there is work for the last one too."""
        wanted, count = self._options.kills, self._options.records
        share = min(1.0, (self.kills.total() + 1) / (wanted + 1))
        self._traffic.quota = max(self._traffic.quota, math.ceil(count * share))

    def _live_for_a_while(self) -> None:
        """Let the consumer live to a random moment: seldom during its start, else some time after it."""
        if self._rng.random() < YOUNG_SHARE:
            self._pass(self._rng.uniform(0, YOUNG_SECONDS))
            return
        until = time.monotonic() + READY_SECONDS
        while not self._world.consumer_ready():
            if time.monotonic() > until:
                raise StormError(self._still_open("the consumer does not get ready"))
            self._pass(LOOK_SECONDS)
        self._pass(self._rng.uniform(0, LONGEST_LIFE_SECONDS))

    def _await_work(self) -> None:
        """Wait for a moment at which a kill meets something half done; where nothing is, one more record comes."""
        traffic = self._traffic
        while not self._is_worth_a_kill(self._world.open_work()):
            if len(traffic.causes) == traffic.quota:  # what was published is over
                if traffic.quota == self._options.records:
                    raise StormError(self._still_open("all work is over before the last kill; take more records"))
                traffic.quota += 1
            self._pass(LOOK_SECONDS)

    def _is_worth_a_kill(self, found: Open) -> bool:
        return found.in_flight

    def _await_end(self) -> None:
        """Wait until every record has its outcome and nothing is open anywhere."""
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < self.quiet_seconds:
            answered = len(self._traffic.causes) >= self._options.records
            if not (answered and self._world.open_work().idle) or self._world.pending():
                quiet_since = time.monotonic()
            self._pass(0.2)

    def _pass(self, seconds: float) -> None:
        """Let time pass, look after everything, and tell how it goes."""
        time.sleep(seconds)
        self._world.check_alive()
        if self._traffic.failure is not None:
            raise StormError(f"builder or listener ended: {self._traffic.failure!r}")
        now = time.monotonic()
        if now > self._ends_at:
            raise StormError(self._still_open(f"not over after {self._options.minutes:g} minutes"))
        if now - self._told_at >= TELL_SECONDS:
            self._told_at = now
            print(f"{now - self._began:6.1f} s: {self._progress()}", flush=True)

    def _progress(self) -> str:
        found, traffic = self._world.open_work(), self._traffic
        steps = ", ".join(f"{count} {state}" for state, count in sorted(found.steps.items())) or "none"
        return (
            f"{self.kills.total()}/{self._options.kills} kills ({self.kills['broker']} of the broker), "
            f"{traffic.published}/{self._options.records} published, {len(traffic.causes)} outcomes; "
            f"steps: {steps}; {found.unsent} unsent, {found.rechecks} to be looked at again"
        )

    def _still_open(self, why: str) -> str:
        return "\n  ".join([f"{why}: {self._progress()}", *self._world.waiting_steps()])


@dataclass(frozen=True, slots=True)
class Ending:
    """How a storm ended: whether the promise was kept, and what is told of it, the summary last."""

    good: bool
    lines: Sequence[str]


def pace(options: argparse.Namespace) -> float:
    """Return the seconds from one record to the next, at least."""
    return CYCLE_SECONDS * max(1, int(options.kills)) / int(options.records)


def storm(options: argparse.Namespace, folder: Path) -> Ending:
    """Do everything and look for damage."""
    events = announce(folder / "records", options.records, options.seed)
    world = World(folder, options.seed)
    try:
        world.start()
        with Traffic(world.rabbit.url, events, pace(options)) as traffic:
            if not traffic.listening.wait(READY_SECONDS):
                raise StormError("the listener found no broker")
            run = Storm(options, world, traffic)
            run.run()
            world.stop_consumer()
        print(f"the server's faults: {world.server_state()['met']}", flush=True)
        report = look_at(events, traffic, world)
        return Ending(report.good, [*report.details(), summary(options, report, run.kills.total())])
    finally:
        world.close()


def look_at(events: list[Announced], traffic: Traffic, world: World) -> Report:
    """Check everything that is left behind."""
    evidence = read_evidence(events, traffic.heard, read_ledgers(world.ledgers), world.database)
    report = check(evidence, DESTINATIONS, SETTLE_SECONDS)
    left = asyncio.run(queue_lengths(world.rabbit.url))
    if any(left.values()):
        report.problems.append(f"messages were left: {left}")
    return report


def summary(options: argparse.Namespace, report: Report, kills: int) -> str:
    """Write the last line."""
    return (
        f"kill-storm: seed {options.seed}, {options.records} records, {kills} kills, lost {len(report.lost)}, "
        f"duplicated {len(report.duplicated)}, {report.settled} unknown outcomes settled, "
        f"{report.late_reported} late commits reported, {report.outcomes} outcomes"
    )


def read_options(
    parser: argparse.ArgumentParser, arguments: list[str] | None, *, records: int, kills: int | None = None
) -> argparse.Namespace:
    """Read the command line of a storm; without ``kills`` there is one for ten records."""
    parser.add_argument("--records", type=int, default=records)
    parser.add_argument("--kills", type=int, default=kills, help=f"default: {kills or 'one for ten records'}")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--minutes", type=float, help="longest run; default: enough for a slow machine")
    options = parser.parse_args(arguments)
    if options.records < 1:
        parser.error("--records: at least 1")
    if options.kills is None:
        options.kills = max(10, options.records // 10)
    if options.minutes is None:
        options.minutes = 5 + options.kills * 8 / 60
    return options


def play(name: str, options: argparse.Namespace, whole: Callable[[argparse.Namespace, Path], Ending]) -> int:
    """Run a storm in a folder of its own; exit code 1 when anything was lost, duplicated or otherwise wrong."""
    print(f"{name}: seed {options.seed}, {options.records} records, {options.kills} kills", flush=True)
    logging.disable(logging.CRITICAL)  # the libraries tell at length of every death of the broker
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="nexus-storm-"))
    try:
        ending = whole(options, folder)
    except StormError as error:
        print(f"{name} failed (seed {options.seed}): {error}\neverything is kept in {folder}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; everything is kept in {folder}", file=sys.stderr)
        return 130
    if ending.good:
        shutil.rmtree(folder)
    else:
        print(f"everything is kept in {folder}", flush=True)
    for line in ending.lines:
        print(line, flush=True)
    return 0 if ending.good else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the storm against the test plugins."""
    parser = argparse.ArgumentParser(prog="python -m tests.storm.run", description=__doc__)
    return play("kill-storm", read_options(parser, arguments, records=60), storm)


if __name__ == "__main__":
    sys.exit(main())
