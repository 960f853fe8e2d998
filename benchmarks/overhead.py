"""Records a second from queue to confirmed outcome: this consumer beside a bare loop and FastStream.

All run in one go on one private RabbitMQ node, in interleaved rounds, so a busy machine is busy for everyone.
The absolute numbers are this machine's; the two ratios are what the benchmark is about.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.candidates import CANDIDATES
from benchmarks.measure import InvalidRunError, Measured, measure
from benchmarks.messages import built
from tools.records import Record, make_record
from tools.servers.rabbitmq import RabbitServer

GOAL = 0.4  # ours/bare: what crash safety may cost at most
_RECORD_BYTES = 2_000
_FEWEST_RECORDS = 100  # fewer than that are over before a rate can be seen

Results = Mapping[str, Sequence[Measured]]
Errors = Mapping[str, str]


def main() -> int:
    """Run the rounds, print the table and the line with the ratios; 1 if a run was wrong or too slow."""
    options = _options()
    console = Console()
    records = [make_record(index, size=_RECORD_BYTES) for index in range(options.records)]
    with tempfile.TemporaryDirectory(prefix="nexus-bench-") as folder, RabbitServer(Path(folder)) as server:
        results, errors = _rounds(console, server.url, records, options)
    console.print(_table(results, errors))
    for name, reason in errors.items():
        console.print(f"{name}: {reason}", markup=False, highlight=False)
    rates = {name: statistics.median(run.rate for run in runs) for name, runs in results.items() if runs}
    too_slow = _ratio(rates, "bare") < GOAL
    if too_slow:
        console.print(f"ours/bare is below the goal of {GOAL}")
    print(_last_line(rates))
    return 1 if errors or too_slow else 0


def _rounds(
    console: Console, url: str, records: Sequence[Record], options: argparse.Namespace
) -> tuple[Results, Errors]:
    """Measure everyone in every round; who failed once has no rate any more and is not asked again."""
    results: dict[str, list[Measured]] = {name: [] for name in options.only}
    errors: dict[str, str] = {}
    for number in range(options.rounds):
        for name in _rotated(options.only, number):
            if name in errors:
                continue
            console.print(f"round {number + 1} of {options.rounds}: {name}", style="dim")
            try:
                results[name].append(_one(name, url, records))
            except InvalidRunError as error:
                errors[name] = str(error)
                results[name].clear()
    return results, errors


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--records", type=int, default=5_000, help="messages in one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="how often everyone is measured")
    parser.add_argument("--only", type=_names, default=list(CANDIDATES), help="a comma-separated choice")
    options = parser.parse_args()
    if options.records < _FEWEST_RECORDS or options.rounds < 1:
        parser.error(f"it takes at least {_FEWEST_RECORDS} records and one round")
    return options


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CANDIDATES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {unknown}; there are {', '.join(CANDIDATES)}")
    return names


def _rotated(names: Sequence[str], number: int) -> list[str]:
    """Give everyone each place in the order once, since a node grows slower while it works."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def _one(name: str, url: str, records: Sequence[Record]) -> Measured:
    with tempfile.TemporaryDirectory(prefix=f"nexus-bench-{name}-") as folder:
        candidate = CANDIDATES[name](url, Path(folder), records)
        return asyncio.run(measure(url, candidate, built(records)))


def _table(results: Results, errors: Errors) -> Table:
    table = Table(title="records from queue to confirmed outcome")
    for heading in ("", "min /s", "median /s", "max /s", "from first /s", "CPU ms each", "peak MiB"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, runs in results.items():
        if name in errors or not runs:
            table.add_row(name, "error")
            continue
        rates = [run.rate for run in runs]
        table.add_row(
            name,
            *(f"{rate:.0f}" for rate in (min(rates), statistics.median(rates), max(rates))),
            f"{statistics.median(run.whole_rate for run in runs):.0f}",
            f"{statistics.median(run.cpu_ms for run in runs):.2f}",
            f"{max(run.peak_mib for run in runs):.0f}",
        )
    return table


def _last_line(rates: Mapping[str, float]) -> str:
    parts = [f"{name} {rate:.0f}/s" for name, rate in rates.items()]
    parts += [f"ours/{peer} {_ratio(rates, peer):.2f}" for peer in rates if peer != "ours" and "ours" in rates]
    return "bench: " + ", ".join(parts)


def _ratio(rates: Mapping[str, float], peer: str) -> float:
    """Compare with a peer; without both numbers there is nothing to miss a goal with."""
    if "ours" not in rates or peer not in rates:
        return float("inf")
    return rates["ours"] / rates[peer]


if __name__ == "__main__":
    sys.exit(main())
