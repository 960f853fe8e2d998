"""Kill the service at every point of every scenario: ``python -m tests.crash.run``.

Each scenario is traced first; then each point that was passed gets a run of its own, in which the service dies
there, is started again, and must come to the same end. ``--tenth SEED`` takes a drawn tenth of the points.
"""

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from tests.crash.checks import Problem, problems_of
from tests.crash.nursery import Nursery
from tests.crash.scenarios import LINKED, SCENARIOS
from tests.crash.world import Remote, World
from tests.integration.harness import Bus, Site
from tools.servers.ports import free_port
from tools.servers.postgresql import PostgresServer
from tools.servers.process import Child, clean_environment
from tools.servers.rabbitmq import RabbitServer

T = TypeVar("T")
R = TypeVar("R")

DATABASES = ("sqlite", "postgresql")
PROJECT = Path(__file__).resolve().parents[2]
PLUGIN = Path(__file__).with_name("destination.py")
LINKER = Path(__file__).with_name("linker.py")
#: A point that a run did not pass gets so many more runs: which commit takes what is a matter of time.
MORE_RUNS = 3


@dataclass(frozen=True)
class Case:
    """One run: a scenario on a database, with a point to die at or none."""

    database: str
    scenario: str
    point: str | None = None


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    case: Case
    problems: tuple[Problem, ...] = ()
    reached: bool = False
    trace: tuple[str, ...] = ()
    log: str = ""

    @property
    def good(self) -> bool:
        """Tell whether the service died where it should and everything was right in the end."""
        return not self.problems and (self.reached or self.case.point is None)


@dataclass
class Stage:
    """The servers that all runs share; each run has a part of its own in each of them."""

    folder: Path
    rabbit: RabbitServer
    remote_port: int
    nursery: Nursery
    postgres: PostgresServer | None
    at_once: int
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @contextmanager
    def world(self, case: Case) -> Iterator[World]:
        """Give a run its installation and take it away again."""
        name = f"run{next(self.numbers)}"
        folder = self.folder / name
        with ExitStack() as stack:
            url = self.rabbit.create_vhost(name)
            stack.callback(self.rabbit.delete_vhost, name)
            database = None
            if case.database == "postgresql" and self.postgres is not None:
                database = self.postgres.create_database(name)
                stack.callback(self.postgres.drop_database, name)
            remote = Remote(self.remote_port, name)
            stack.callback(remote.forget)
            site = Site(folder, url, database, NX_DOORS_URL=remote.url, NX_LOCAL_ARCHIVE_TIMEOUT_SECONDS="5")
            (site.plugins / "doors.py").write_bytes(PLUGIN.read_bytes())
            linked = None
            if case.scenario in LINKED:
                linked = Remote(self.remote_port, f"{name}-linker")
                stack.callback(linked.forget)
                site.settings["NX_LINKER_URL"] = linked.url
                (site.plugins / "linker.py").write_bytes(LINKER.read_bytes())
            world = World(site, stack.enter_context(Bus(url)), remote, self.nursery, case.point, linked)
            stack.callback(shutil.rmtree, folder)
            stack.callback(world.kill)
            yield world


@contextmanager
def staged(databases: Sequence[str], at_once: int) -> Iterator[Stage]:
    """Start the servers."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crash-")))
        rabbit = stack.enter_context(RabbitServer(folder / "rabbitmq", management=True))
        postgres = None
        if "postgresql" in databases:
            postgres = stack.enter_context(PostgresServer(folder / "postgresql", fsync=False))
        port = free_port()
        command = [sys.executable, "-m", "tests.crash.server", str(port)]
        server = Child(command, env=clean_environment(), log=folder / "server.log", cwd=PROJECT)
        stack.callback(server.stop, 5)
        yield Stage(folder, rabbit, port, stack.enter_context(Nursery()), postgres, at_once)


def perform(stage: Stage, case: Case) -> Result:
    """Do one run."""
    with stage.world(case) as world:
        try:
            world.ready()
            SCENARIOS[case.scenario](world)
            world.finish()
            problems = tuple(problems_of(world))
        except Exception as error:  # noqa: BLE001 - whatever broke a run is told with it; the others go on
            broken = Problem("wrong", f"{type(error).__name__}: {error}")
            log = world.log()
            return Result(case, (broken, *left_behind(world)), world.reached, log=log)
        trace = world.trace.read_text().splitlines() if world.trace.exists() else []
        log = world.log() if problems else ""
        return Result(case, problems, world.reached, tuple(dict.fromkeys(trace)), log)


def left_behind(world: World) -> list[Problem]:
    """Check a run that did not come to its end, as far as it can be checked."""
    world.kill()
    with suppress(Exception):  # what broke it is told already
        return problems_of(world)
    return []


def points_of(stage: Stage, database: str, scenarios: Sequence[str]) -> tuple[list[Case], list[Result]]:
    """Trace scenarios twice: what both runs passed are the points. Returns also the runs that went wrong."""
    cases = [Case(database, scenario) for scenario in scenarios]
    results = each(lambda case: perform(stage, case), [*cases, *cases], stage.at_once)
    found = []
    for scenario in scenarios:
        first, second = (result.trace for result in results if result.case.scenario == scenario)
        found += [Case(database, scenario, point) for point in own(scenario, first) if point in set(second)]
    return found, [result for result in results if not result.good]


def own(scenario: str, trace: Sequence[str]) -> list[str]:
    """Leave out what is the same in every scenario, start and stop, but for the first."""
    if scenario == next(iter(SCENARIOS)):
        return list(trace)
    begun = itertools.dropwhile(lambda point: "Intake." not in point, trace)
    return [point for point in begun if "_leave" not in point]


def crash(stage: Stage, case: Case) -> Result:
    """Do a run with its crash, again if it did not come by the point."""
    result = perform(stage, case)
    for _ in range(MORE_RUNS):
        if result.reached or result.problems:
            break
        result = perform(stage, case)
    if not result.reached and not result.problems:
        result = replace(result, problems=(Problem("wrong", "no run passed the point"),))
    show(result)
    return result


def each(work: Callable[[T], R], items: Sequence[T], at_once: int) -> list[R]:
    """Do some at once; the results come in order."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(work, items))


def show(result: Result) -> None:
    """Say what a run came to, and how to repeat it when it went wrong."""
    case = result.case
    said = "ok" if result.good else "FAILED"
    sys.stdout.write(f"{said} {case.database} {case.scenario} {case.point or 'traced'}\n")
    for problem in result.problems:
        sys.stdout.write(f"    {problem}\n")
    if not result.good:
        again = f"    python -m tests.crash.run --database {case.database} --scenario {case.scenario}"
        sys.stdout.write(f"{again}{f' --point {case.point}' if case.point else ''}\n{result.log}\n")
    sys.stdout.flush()


def matrix(stage: Stage, given: argparse.Namespace, databases: Sequence[str]) -> bool:
    """Run everything that was asked for; returns whether all is well."""
    scenarios = [given.scenario] if given.scenario else list(SCENARIOS)
    counts: list[str] = []
    results: list[Result] = []
    for database in databases:
        cases, traced = [Case(database, scenario, given.point) for scenario in scenarios], list[Result]()
        if not given.point:
            cases, traced = points_of(stage, database, scenarios)
        if given.tenth is not None:
            draw = random.Random(given.tenth)  # noqa: S311 - a sample, not a secret
            cases = draw.sample(cases, max(1, len(cases) // 10))
        sys.stdout.write(f"{len(cases)} points on {database}\n")
        for result in traced:
            show(result)
        done = each(lambda case: crash(stage, case), cases, stage.at_once)
        counts.append(f"{sum(result.good for result in done)}/{len(done)}{'' if counts else ' points'} on {database}")
        results += [*traced, *done]
    bad = [result for result in results if not result.good]
    lost, doubled = (sum(p.kind == kind for r in results for p in r.problems) for kind in ("lost", "duplicated"))
    for result in bad:
        show(replace(result, log=""))
    sys.stdout.write(f"crash-matrix: {', '.join(counts)}, {lost} lost, {doubled} duplicated\n")
    return not bad


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.run", description=__doc__)
    parser.add_argument("--database", choices=(*DATABASES, "both"), default="both")
    parser.add_argument("--tenth", type=int, metavar="SEED", help="only a tenth of the points, drawn by this seed")
    parser.add_argument("--scenario", choices=tuple(SCENARIOS))
    parser.add_argument("--point", help="only this point; as printed for one that failed")
    parser.add_argument("--at-once", type=int, default=5, help="runs at the same time")
    given = parser.parse_args()
    databases = DATABASES if given.database == "both" else (given.database,)
    started = time.monotonic()
    with staged(databases, given.at_once) as stage:
        good = matrix(stage, given, databases)
    sys.stderr.write(f"{time.monotonic() - started:.0f} s\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
