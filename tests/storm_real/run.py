"""Kill consumer and broker at random moments while records go to a real CDCS, two notebooks and the archive.

The notebooks' servers misbehave, and CDCS is killed and stays away again and again, so that links come late.
"""

import argparse
import asyncio
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.storm.run import READY_SECONDS, Ending, Storm, pace, play, read_options
from tests.storm.stage import Open, StormError
from tests.storm.traffic import Announced, Traffic, announce, queue_lengths
from tests.storm_real.check import Findings, judge, stem_of
from tests.storm_real.holdings import (
    Held,
    folders_made_twice,
    read_archive,
    read_cdcs,
    read_elabftw,
    read_labarchives,
)
from tests.storm_real.outages import Outages
from tests.storm_real.world import SETTLE_SECONDS, RealWorld

RECORDS, KILLS = 200, 50
#: At least so many of the records are in a notebook before CDCS is there for the first time.
LATE_SHARE = 0.1


class RealStorm(Storm):
    """A storm in which CDCS comes and goes until the last kill."""

    quiet_seconds = max(SETTLE_SECONDS.values()) + 3.0

    def __init__(self, options: argparse.Namespace, world: RealWorld, traffic: Traffic, outages: Outages) -> None:
        super().__init__(options, world, traffic)
        self._outages = outages

    def _is_worth_a_kill(self, found: Open) -> bool:
        return found.busy

    def _await_end(self) -> None:
        self._outages.stop()
        super()._await_end()

    def _pass(self, seconds: float) -> None:
        super()._pass(seconds)
        if self._outages.failure is not None:
            raise StormError(f"CDCS does not come back: {self._outages.failure}")


def storm(options: argparse.Namespace, folder: Path) -> Ending:
    """Do everything and look for damage."""
    events = announce(folder / "records", options.records, options.seed)
    world = RealWorld(folder, options.seed, options.records)
    try:
        world.start()
        wanted = max(1, math.ceil(options.records * LATE_SHARE))
        outages = Outages(world.cdcs, options.seed, lambda: world.done_at("elabftw") >= wanted)
        with outages, Traffic(world.rabbit.url, events, pace(options)) as traffic:
            if not traffic.listening.wait(READY_SECONDS):
                raise StormError("the listener found no broker")
            run = RealStorm(options, world, traffic, outages)
            run.run()
            world.stop_consumer()
        findings = look_at(events, traffic, world)
        kills = run.kills.total()
        if not findings.late_links and kills:
            findings.report.problems.append("no link came late: the storm has not shown what it is for")
        return Ending(findings.good, [*told(findings, world, outages, run), summary(options, findings, kills)])
    finally:
        world.close()


def look_at(events: list[Announced], traffic: Traffic, world: RealWorld) -> Findings:
    """Check everything that is left behind."""
    findings = judge(events, traffic.heard, world.database, everything(events, world), world.cdcs.url)
    left = asyncio.run(queue_lengths(world.rabbit.url))
    if any(left.values()):
        findings.report.problems.append(f"messages were left: {left}")
    return findings


def everything(events: list[Announced], world: RealWorld) -> Iterator[Held]:
    """Return all copies that there are."""
    sessions = {stem_of(event): event.session for event in events}
    yield from read_cdcs(world.cdcs.port, world.cdcs.admin_token, sessions)
    yield from read_elabftw(world.held_by("elabftw"))
    yield from read_labarchives(world.held_by("labarchives"))
    yield from read_archive(world.archive)


def told(findings: Findings, world: RealWorld, outages: Outages, run: Storm) -> Iterator[str]:
    """Tell what happened, and what is wrong."""
    met = world.faults_met()
    yield f"faults met: {sum(met.values())} ({', '.join(f'{count} {kind}' for kind, count in met.items())})"
    yield (
        f"{run.kills['consumer']} kills of the consumer, {run.kills['broker']} of the broker, and {outages.count} of "
        f"CDCS; {findings.report.outcomes} outcomes, {findings.report.settled} unknown outcomes settled, "
        f"{findings.late_links} links came late, {findings.repeated_links} stand twice; "
        f"{folders_made_twice(world.held_by('labarchives'))} folders were made twice"
    )
    yield from findings.details()


def summary(options: argparse.Namespace, findings: Findings, kills: int) -> str:
    """Write the last line."""
    report = findings.report
    return (
        f"kill-storm-real: {options.records} records, {kills} kills, lost {len(report.lost)}, "
        f"duplicated {len(report.duplicated)}, missing links {len(findings.missing_links)}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the storm against real destinations."""
    parser = argparse.ArgumentParser(prog="python -m tests.storm_real.run", description=__doc__)
    return play("kill-storm-real", read_options(parser, arguments, records=RECORDS, kills=KILLS), storm)


if __name__ == "__main__":
    sys.exit(main())
