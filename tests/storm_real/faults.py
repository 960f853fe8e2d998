"""Which requests of a storm meet a fault at the two notebooks: drawn once from the seed, by the request's number."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: A late commit comes so long after the reset of its request: within the settle time.
LATE_SECONDS = 1.2
#: A stalled request is answered only after the consumer has given it up.
STALL_SECONDS = 7.0
RETRY_AFTER_SECONDS = 1

Fault = Mapping[str, Any]
Shares = Sequence[tuple[float, Fault]]

_RETRY = {"retry_after": RETRY_AFTER_SECONDS}
#: Per cent of the requests that have an effect, and of those that only ask.
ELABFTW_WRITES: Shares = (
    (6.0, {"kind": "cut_after"}),
    (3.0, {"kind": "late", "seconds": LATE_SECONDS}),
    (1.5, {"kind": "rate_limit", **_RETRY}),
    (2.5, {"kind": "error", "status": 503}),
    (1.5, {"kind": "error_after", "status": 502}),
    (0.7, {"kind": "stall_after", "seconds": STALL_SECONDS}),
    (0.5, {"kind": "stall", "seconds": STALL_SECONDS}),
    (2.0, {"kind": "truncate"}),
)
ELABFTW_READS: Shares = (
    (1.0, {"kind": "cut"}),
    (0.5, {"kind": "rate_limit", **_RETRY}),
    (1.0, {"kind": "error", "status": 503}),
    (0.3, {"kind": "stall", "seconds": STALL_SECONDS}),
    (0.5, {"kind": "truncate"}),
)
ELABFTW: Mapping[tuple[str, str], Shares] = {
    ("POST", "/experiments"): ELABFTW_WRITES,
    ("POST", "/uploads"): ELABFTW_WRITES,
    ("POST", "/tags"): ELABFTW_WRITES,
    ("PATCH", r"/experiments/\d+"): ELABFTW_WRITES,
    ("GET", "/experiments"): ELABFTW_READS,
    ("GET", r"/experiments/\d+"): ELABFTW_READS,
}

_LABARCHIVES_RETRY = {"status": 429, "retry_after": str(RETRY_AFTER_SECONDS)}
LABARCHIVES_WRITES: Shares = (
    (6.0, {"when": "after", "what": "cut"}),
    (3.0, {"when": "late", "what": "cut", "seconds": LATE_SECONDS}),
    (1.5, {"when": "before", "what": "status", **_LABARCHIVES_RETRY}),
    (2.5, {"when": "before", "what": "status", "status": 503}),
    (1.5, {"when": "after", "what": "status", "status": 502}),
    (0.5, {"when": "after", "what": "stall", "seconds": STALL_SECONDS}),
    (0.3, {"when": "before", "what": "stall", "seconds": STALL_SECONDS}),
    (2.0, {"when": "after", "what": "truncate"}),
)
LABARCHIVES_READS: Shares = (
    (0.5, {"when": "before", "what": "cut"}),
    (0.3, {"when": "before", "what": "status", **_LABARCHIVES_RETRY}),
    (0.5, {"when": "before", "what": "status", "status": 503}),
    (0.1, {"when": "before", "what": "stall", "seconds": STALL_SECONDS}),
    (0.3, {"when": "after", "what": "truncate"}),
)
LABARCHIVES: Mapping[str, Shares] = {
    "insert_node": LABARCHIVES_WRITES,
    "add_entry": LABARCHIVES_WRITES,
    "add_attachment": LABARCHIVES_WRITES,
    "get_tree_level": LABARCHIVES_READS,
    "get_entries_for_page": LABARCHIVES_READS,
    "user_info_via_id": LABARCHIVES_READS,
}


def drawn(place: str, seed: int, requests: int, shares: Shares) -> Iterable[tuple[int, Fault]]:
    """Yield the numbers (from 0) of the requests that meet a fault, and the fault."""
    rng = random.Random(f"{seed}:{place}")  # noqa: S311 - has to be repeatable, not secret
    for number in range(requests):
        point = rng.uniform(0, 100)
        for share, fault in shares:
            point -= share
            if point < 0:
                yield number, fault
                break


def of_elabftw(seed: int, requests: int) -> list[dict[str, Any]]:
    """Return the faults of that many requests of each kind; ``skip`` counts from the first request."""
    return [
        {**fault, "method": method, "path": path, "skip": number}
        for (method, path), shares in ELABFTW.items()
        for number, fault in drawn(f"elabftw {method} {path}", seed, requests, shares)
    ]


def of_labarchives(seed: int, requests: int) -> list[dict[str, Any]]:
    """Return the faults of that many requests of each kind; ``skip`` counts from the fault before."""
    found = []
    for method, shares in LABARCHIVES.items():
        next_number = 0
        for number, fault in drawn(f"labarchives {method}", seed, requests, shares):
            found.append({**fault, "method": method, "skip": number - next_number})
            next_number = number + 1
    return found


def met(elabftw: Iterable[Mapping[str, Any]], labarchives: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Count by kind the faults that the requests of both ledgers met."""
    found = Counter(f"elabftw {line['fault']}" for line in elabftw if line["fault"])
    for line in labarchives:
        fault = line["fault"]
        if fault:
            what = fault["status"] if fault["what"] == "status" else fault["what"]
            found[f"labarchives {what} {fault['when']}"] += 1
    return dict(sorted(found.items()))
