"""Realistic microscopy records for tests, benchmarks and demonstrations, the same ones for the same seed.

The records follow the Nexus experiment schema. They are put together from text templates, because a
benchmark that needs ten thousand records should spend its time on the export and not on building trees.
"""

import argparse
import itertools
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from functools import cached_property
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

SMALLEST = 1_000
_BRIEF_BELOW = 4_000  # smaller records leave out what the schema does not ask for
_PROSE_ROOM = 80  # bytes kept free for the motivation
_LAST_DAY = datetime(2026, 11, 24, tzinfo=UTC)
_GOLDEN = 0.618033988749895

_NAMESPACE = "https://data.nist.gov/od/dm/nexus/experiment/v1.0"
_START = f'<?xml version="1.0" encoding="UTF-8"?>\n<Experiment xmlns="{_NAMESPACE}"'
_PREFIXES = f' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xmlns:nx="{_NAMESPACE}"'
_ACTIVITY_END = b"  </acquisitionActivity>\n"


@dataclass(frozen=True)
class Record:
    """One experiment record and the facts about it that an event announces; the content says the same."""

    name: str
    session: str
    instrument_pid: str
    dt_from: datetime
    dt_to: datetime
    user: str
    content: bytes


class _Quantity(NamedTuple):
    """A measured value and the range it is drawn from."""

    name: str
    unit: str
    low: float
    high: float
    digits: int


class _Kind(NamedTuple):
    """What one instrument mode leaves behind: a file format and the metadata read from it."""

    dataset_type: str
    stem: str
    suffix: str
    media_type: str
    data_type: str
    quantities: tuple[_Quantity, ...]


class _Instrument(NamedTuple):
    """An instrument, its place in the file store and the hours it is away from UTC."""

    pid: str
    label: str
    folder: str
    hours: int
    setup: tuple[_Quantity, ...]
    kinds: tuple[_Kind, ...]


class _Person(NamedTuple):
    """Somebody who books instruments."""

    name: str
    login: str


class _Specimen(NamedTuple):
    """A sample and the project it belongs to."""

    name: str
    description: str
    elements: str
    project: str
    project_id: str


_STAGE = (
    _Quantity("Stage Position X", "µm", -900, 900, 3),
    _Quantity("Stage Position Y", "µm", -900, 900, 3),
    _Quantity("Stage Position Z", "µm", -250, 250, 3),
    _Quantity("Stage Tilt", "°", -30, 30, 2),
)
# From here every table begins with a length in µm and one in Å; brief records stop there at the latest.
_TEM_SETUP = (
    _Quantity("Condenser Aperture", "µm", 30, 150, 0),
    _Quantity("Pixel Size", "Å", 0.12, 9.5, 4),
    _Quantity("Voltage", "kV", 80, 300, 0),
    _Quantity("Emission Current", "µA", 12, 165, 2),
    _Quantity("Spot Size", "", 1, 9, 0),
)
_SEM_SETUP = (
    _Quantity("Working Distance", "µm", 3000, 15000, 1),
    _Quantity("Coating Thickness", "Å", 20, 120, 0),
    _Quantity("Voltage", "kV", 1, 30, 1),
)
_IMAGING = (
    _Quantity("Field of View", "µm", 0.02, 40, 4),
    _Quantity("Defocus", "Å", -9000, 9000, 1),
    _Quantity("Exposure Time", "s", 0.05, 8, 3),
    _Quantity("Indicated Magnification", "", 2000, 900000, 0),
    *_STAGE,
)
_DIFFRACTION = (
    _Quantity("Selected Area", "µm", 0.1, 4, 2),
    _Quantity("Lattice Spacing", "Å", 0.8, 6, 4),
    _Quantity("Camera Length", "mm", 100, 1200, 0),
    *_STAGE,
)
_EELS = (
    _Quantity("Scan Width", "µm", 0.01, 2, 4),
    _Quantity("Probe Size", "Å", 0.6, 12, 2),
    *_STAGE,
)
_SURFACE = (
    _Quantity("Horizontal Field Width", "µm", 0.5, 2500, 3),
    _Quantity("Depth Step", "Å", 50, 400, 1),
    _Quantity("Dwell Time", "µs", 0.1, 30, 2),
    *_STAGE,
)
_EDS = (
    _Quantity("Interaction Depth", "µm", 0.2, 5, 3),
    _Quantity("Window Thickness", "Å", 100, 900, 0),
    _Quantity("Live Time", "s", 10, 300, 2),
    *_STAGE,
)
_TEM = (
    _Kind("Image", "image", ".dm3", "application/x-dm3", "TEM_Imaging", _IMAGING),
    _Kind("Diffraction", "saed", ".dm3", "application/x-dm3", "TEM_Diffraction", _DIFFRACTION),
    _Kind("SpectrumImage", "eels map", ".dm4", "application/x-dm4", "STEM_EELS", _EELS),
)
_SEM = (
    _Kind("Image", "surface", ".tif", "image/tiff", "SEM_Imaging", _SURFACE),
    _Kind("Spectrum", "eds point", ".emsa", "text/plain", "SEM_EDS", _EDS),
)
_INSTRUMENTS = (
    _Instrument("FEI-Titan-TEM-635816", "FEI Titan TEM", "Titan", -5, _TEM_SETUP, _TEM),
    _Instrument("JEOL-JEM3010-TEM-471093", "JEOL JEM3010", "JEM3010", 1, _TEM_SETUP, _TEM[:2]),
    _Instrument("FEI-Helios-DB-330217", "FEI Helios", "Helios", -5, _SEM_SETUP, _SEM),
    _Instrument("Hitachi-S5500-SEM-208846", "Hitachi S5500", "S5500", 9, _SEM_SETUP, _SEM[:1]),
)
_PEOPLE = (
    _Person("Zoë Müller", "zmueller"),
    _Person("José Ibáñez", "jibanez"),
    _Person("Siân O'Connor", "soconnor"),
    _Person("Åsa Lindström", "alindstrom"),
    _Person("François Lefèvre", "flefevre"),
)
_SPECIMENS = (
    _Specimen("Au/TiO₂ catalyst", "Gold islands, 20 Å to 80 Å", "Ti O Au", "Catalysts & supports", "CAT-118"),
    _Specimen("Al-Li lamella", "FIB lamella, < 0.1 µm thick", "Al Li Cu", "Light alloys", "ALY-042"),
    _Specimen("SiC fibre", "Single fibre, Ø 12 µm", "Si C O", "Ceramic composites", "CMC-307"),
    _Specimen("In₂O₃ film", "Sputtered film, 450 Å", "In O Sn", "Clear conductors", "TCO-256"),
    _Specimen('"Widmanstätten" iron', "Etched section, 3 µm polish", "Fe Ni P", "Meteorites", "MET-019"),
)
_QUESTION = "Grain size &lt; 5 µm?".encode()  # never without a reason, however little room there is
# Each sentence is cut into escaped words once, so that filling a record to its size only counts bytes.
_SENTENCES = tuple(
    [escape(word).encode() for word in sentence.split()]
    for sentence in (
        "Compare the spacing & tilt with the 2.35 Å of the reference.",
        "Müller's last session showed drift of 3 Å a minute, so the stage rests for an hour first.",
        "Map the composition over 2 µm by 2 µm and look for depleted boundaries.",
        "The naïve model predicts facets > 100 Å; earlier images disagree.",
        'Repeat the "as received" state before annealing at 450 °C.',
        "Ångström-scale roughness decides whether the coating can be used.",
    )
)


@dataclass(frozen=True)
class _Session:
    """One booked session: who used what, when, and on which sample."""

    identifier: str
    instrument: _Instrument
    person: _Person
    colleague: _Person
    specimen: _Specimen
    sample_id: str
    start: datetime
    end: datetime

    @cached_property
    def folder(self) -> str:
        """Where the instrument stored the files, as a URL path."""
        day = f"{self.start:%Y-%m-%d}"
        return quote(f"/{self.instrument.folder}/{self.person.login}/{day} {self.specimen.name}/")


def make_record(index: int, *, seed: int = 1, size: int = 54_000) -> Record:
    """Make record number `index` of a seed, about `size` bytes long.

    Another size changes the content alone: the same session, built again with more or fewer files.
    """
    if size < SMALLEST:
        raise ValueError(f"a record needs at least {SMALLEST} bytes, not {size}")
    rng = random.Random(f"{seed}:{index}")  # noqa: S311 - sample text has to be repeatable, not secret
    session = _draw_session(rng)
    brief = size < _BRIEF_BELOW
    before, after = (part.encode() for part in _frame(session, brief=brief))
    end = b"</Experiment>\n"
    room = size - len(before) - len(after) - len(end)
    activities = b"".join(_activities(session, rng, room - _PROSE_ROOM, brief=brief))
    motivation = _prose(rng, room - len(activities))
    return Record(
        name=f"{session.start:%Y-%m-%d}_{session.instrument.pid}_{index:05d}.xml",
        session=session.identifier,
        instrument_pid=session.instrument.pid,
        dt_from=session.start,
        dt_to=session.end,
        user=session.person.name,
        content=b"".join((before, motivation, after, activities, end)),
    )


def write_records(
    folder: Path, count: int, *, seed: int = 1, sizes: tuple[int, int] = (30_000, 100_000)
) -> list[Record]:
    """Write `count` records into a folder, their sizes spread evenly between the two bounds."""
    low, high = sizes
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(count):
        # steps of the golden ratio cover the range evenly for any count, without an order by size
        size = low + int((high - low) * (index * _GOLDEN % 1))
        record = make_record(index, seed=seed, size=size)
        (folder / record.name).write_bytes(record.content)
        records.append(record)
    return records


def _draw_session(rng: random.Random) -> _Session:
    """Draw who did what and when."""
    instrument = rng.choice(_INSTRUMENTS)
    person, colleague = rng.sample(_PEOPLE, 2)
    zone = timezone(timedelta(hours=instrument.hours))
    day = (_LAST_DAY - timedelta(days=rng.randrange(120))).replace(tzinfo=zone)
    start = day + timedelta(minutes=15 * rng.randrange(28, 64))
    return _Session(
        identifier=str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        instrument=instrument,
        person=person,
        colleague=colleague,
        specimen=rng.choice(_SPECIMENS),
        sample_id=f"sample-{rng.randrange(10_000):04d}",
        start=start,
        end=start + timedelta(minutes=15 * rng.randrange(4, 30)),
    )


def _frame(session: _Session, *, brief: bool) -> tuple[str, str]:
    """Write what stands before the words of the motivation and what follows them up to the activities."""
    tool, specimen = session.instrument, session.specimen
    name, project = escape(specimen.name), escape(specimen.project)
    rest = "" if brief else f"    <collaborator>{escape(session.colleague.name)}</collaborator>\n"
    before = (
        f"{_START}{'' if brief else _PREFIXES}>\n"
        f"  <title>{name}</title>\n"
        f"  <id>{session.identifier}</id>\n"
        f"  <summary>\n"
        f"    <experimenter>{escape(session.person.name)}</experimenter>\n"
        f"{rest}"
        f'    <instrument pid="{tool.pid}">{tool.label}</instrument>\n'
        f"    <reservationStart>{session.start.isoformat()}</reservationStart>\n"
        f"    <reservationEnd>{session.end.isoformat()}</reservationEnd>\n"
        f"    <motivation>"
    )
    after = f'</motivation>\n  </summary>\n  <sample id="{session.sample_id}">\n    <name>{name}</name>\n'
    if not brief:
        elements = "".join(f"<{symbol}/>" for symbol in specimen.elements.split())
        after += (
            f"    <description>{escape(specimen.description)}</description>\n    <elements>{elements}</elements>\n"
        )
    after += f"  </sample>\n  <project>\n    <name>{project}</name>\n"
    if not brief:
        after += "    <division>Materials</division>\n    <group>Électronique &amp; Optique</group>\n"
    after += f"    <project_id>{specimen.project_id}</project_id>\n  </project>\n"
    return before, after


def _activities(session: _Session, rng: random.Random, room: int, *, brief: bool) -> Iterator[bytes]:
    """Write acquisition activities until the room is used; the first one is written in any case."""
    used = 0
    numbers = itertools.count(1)
    for seqno in itertools.count():
        opening = _activity_start(session, rng, seqno, used / max(room, 1), brief=brief)
        dataset = _dataset(session, rng, next(numbers), brief=brief)
        need = len(opening) + len(dataset) + len(_ACTIVITY_END)
        if seqno and used + need > room:
            return
        used += need
        yield opening
        yield dataset
        for _ in range(rng.randint(2, 11)):
            dataset = _dataset(session, rng, next(numbers), brief=brief)
            if used + len(dataset) > room:
                break
            used += len(dataset)
            yield dataset
        yield _ACTIVITY_END


def _activity_start(session: _Session, rng: random.Random, seqno: int, progress: float, *, brief: bool) -> bytes:
    """Open an activity that begins when that share of the session is over."""
    start = session.start + (session.end - session.start) * progress
    setup = session.instrument.setup[: 1 if brief else None]
    return (
        f'  <acquisitionActivity seqno="{seqno}">\n'
        f"    <startTime>{start.isoformat()}</startTime>\n"
        f"    <sampleID>{session.sample_id}</sampleID>\n"
        f"    <setup>\n{_values('param', setup, rng)}    </setup>\n"
    ).encode()


def _dataset(session: _Session, rng: random.Random, number: int, *, brief: bool) -> bytes:
    """Write one file with its place, its preview and its metadata."""
    kind = rng.choice(session.instrument.kinds)
    file = f"{kind.stem} {number:03d}{kind.suffix}"
    path = f"{'/' if brief else session.folder}{quote(file)}"
    details = ""
    if not brief:
        details = f'      <meta name="Data Type">{kind.data_type}</meta>\n'
        if not rng.randrange(10):
            details += '      <meta name="Operator" warning="true">Supervisor &amp; guest</meta>\n'
    quantities = _values("meta", kind.quantities[: 2 if brief else None], rng)
    return (
        f'    <dataset type="{kind.dataset_type}" role="Experimental">\n'
        f"      <name>{file}</name>\n"
        f"      <location>{path}</location>\n"
        f"      <format>{kind.media_type}</format>\n"
        f"      <preview>{path}.thumb.png</preview>\n"
        f"{details}{quantities}"
        f"    </dataset>\n"
    ).encode()


def _values(tag: str, quantities: tuple[_Quantity, ...], rng: random.Random) -> str:
    """Write measured values, one a line."""
    lines = []
    for name, unit, low, high, digits in quantities:
        value = low + (high - low) * rng.random()
        of_unit = f' unit="{unit}"' if unit else ""
        lines.append(f'      <{tag} name="{name}"{of_unit}>{value:.{digits}f}</{tag}>\n')
    return "".join(lines)


def _prose(rng: random.Random, room: int) -> bytes:
    """Fill the room with whole words, so that a record comes out close to the size asked for."""
    words = [_QUESTION]
    used = len(_QUESTION)
    sentences = (rng.choice(_SENTENCES) for _ in itertools.count())
    for word in itertools.chain.from_iterable(sentences):
        used += len(word) + 1
        if used > room:
            break
        words.append(word)
    return b" ".join(words)


def main(arguments: list[str] | None = None) -> None:
    """Write records into a folder from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.records", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--min-size", type=int, default=30_000)
    parser.add_argument("--max-size", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    if not SMALLEST <= given.min_size <= given.max_size:
        parser.error(f"sizes run from {SMALLEST} bytes up, --min-size not above --max-size")
    sizes = (given.min_size, given.max_size)
    records = write_records(given.folder, given.count, seed=given.seed, sizes=sizes)
    total = sum(len(record.content) for record in records)
    print(f"{len(records)} records, {total:,} bytes, in {given.folder}")


if __name__ == "__main__":
    main()
