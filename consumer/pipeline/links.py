"""Late links: a copy gets its link when what it links to comes after it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from pydantic_core import to_json

from consumer.destinations.registry import Registered
from consumer.store import links
from consumer.store.connection import Connection
from consumer.store.links import LinkedCopy
from consumer.store.rows import LINK_FAILED, AttemptEnd, Claim, StepState


def links_digest(addresses: Mapping[str, str]) -> str:
    """Return what is remembered of the links that a copy has."""
    return hashlib.sha256(to_json(dict(sorted(addresses.items())))).hexdigest()


def of_link(end: AttemptEnd) -> AttemptEnd:
    """Let an attempt to add links end: the record is exported whatever it came to, and its result stays."""
    claim, step = end.claim, replace(end.step, result=end.claim.step.result)
    if step.state.terminal:
        failed = step.state not in {StepState.DONE, StepState.SKIPPED}
        step = replace(
            step,
            state=StepState.DONE,
            error_code=LINK_FAILED if failed else None,
            reason=f"{step.error_code}: {step.reason}" if failed else None,
        )
    log = replace(end.log, purpose=claim.step.purpose) if end.log else None
    copy = replace(end.copy, sent_sha256=None, build_time=None) if end.copy else None
    # what is not known of another build's request stays unknown
    unresolved_at = end.unresolved_at or claim.copy.unresolved_at
    return replace(end, step=step, log=log, copy=copy, unresolved_at=unresolved_at)


@dataclass(frozen=True, slots=True)
class Links:
    """Who links to whom, among the destinations that records go to."""

    targets: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, enabled: Mapping[str, Registered]) -> "Links":
        """Collect the declared links."""
        return cls({name: item.links_to for name, item in enabled.items() if item.links_to})

    @property
    def involved(self) -> frozenset[str]:
        """Return every destination that links or is linked to."""
        return frozenset(self.targets).union(*self.targets.values())

    async def add_to(self, connection: Connection, claims: list[Claim]) -> list[Claim]:
        """Give each claim the addresses that it links to."""
        linking = [claim for claim in claims if claim.step.destination in self.targets]
        if not linking:
            return claims
        found = await links.load_copies(connection, {c.job.session for c in linking}, sorted(self.involved))
        return [
            replace(claim, links=self._addresses(claim.step.destination, found.get(claim.job.session, {})))
            for claim in claims
        ]

    async def make_due(self, connection: Connection, ends: Sequence[AttemptEnd], now: datetime) -> bool:
        """After these ends were written: let finished steps add links that they lack; True if there are any."""
        asked: dict[str, set[str]] = {}
        for end in ends:
            asked.setdefault(end.claim.job.session, set()).update(self._to_ask(end))
        asked = {session: names for session, names in asked.items() if names}
        if not asked:
            return False
        found = await links.load_copies(connection, asked, sorted(self.involved))
        lacking = {
            (session, name) for session, names in asked.items() for name in names
            if self._lacks(name, found.get(session, {}))
        }  # fmt: skip
        if not lacking:
            return False
        sessions, names = {session for session, _ in lacking}, sorted({name for _, name in lacking})
        finished = await links.finished_steps(connection, sessions, names)
        wanted = [step for step in finished if (step.session, step.destination) in lacking]
        await links.make_due(connection, wanted, now)
        return bool(wanted)

    def _to_ask(self, end: AttemptEnd) -> set[str]:
        """Say whose copy may lack a link since this end."""
        own = end.claim.step.destination
        asked = set()
        if end.step.state is StepState.DONE and not end.claim.step.links:
            asked = {name for name, targets in self.targets.items() if own in targets}
        wrote = end.copy is not None or not end.claim.step.links  # else asking again would have no end
        if own in self.targets and end.step.state.terminal and wrote:
            asked.add(own)  # what it links to may have come while it ran
        return asked

    def _addresses(self, name: str, found: Mapping[str, LinkedCopy]) -> dict[str, str]:
        urls = {target: found[target].record_url for target in self.targets.get(name, ()) if target in found}
        return {target: url for target, url in urls.items() if url}

    def _lacks(self, name: str, found: Mapping[str, LinkedCopy]) -> bool:
        wanted = self._addresses(name, found)
        return bool(wanted) and name in found and found[name].links_sha256 != links_digest(wanted)
