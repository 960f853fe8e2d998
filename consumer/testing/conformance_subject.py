"""What is put to the proof: a destination's class, the settings it is built from, and the server behind it."""

import asyncio
import base64
import hashlib
import importlib
import shlex
import sys
import urllib.request
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from xml.sax.saxutils import escape

from pydantic import BaseModel, SecretStr

from consumer.config import Environment, Value
from consumer.destinations.contract import ExportContext, LastExport
from consumer.destinations.registry import Registered, build, load_file, load_registry
from consumer.errors import ConfigurationError
from consumer.events import Reservation
from consumer.pipeline.attempt import ContextActivity, record_key

_COUNT_SECONDS = 30.0
_SHORTEST_SECRET = 4
_BEGIN = datetime(2026, 3, 4, 9, tzinfo=UTC)
_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
_RECORD = """<?xml version="1.0" encoding="UTF-8"?>
<Experiment xmlns="https://data.nist.gov/od/dm/nexus/experiment/v1.0">
  <id>{session}</id>
  <summary>
    <experimenter>Zoë &amp; Ada</experimenter>
    <instrument pid="{instrument}">{instrument}</instrument>
    <reservationStart>2026-03-04T09:00:00+00:00</reservationStart>
    <reservationEnd>2026-03-04T10:30:00+00:00</reservationEnd>
    <motivation>Grain size &lt; 5 µm?</motivation>
  </summary>
</Experiment>
"""


@dataclass(frozen=True, slots=True)
class Options:
    """How the proof goes: the limit of an attempt that is stalled, H, and how many cases run at once.

    ``reads`` and ``creates`` are patterns, searched in ``METHOD path``, for requests whose method does not say what
    they do; ``moments`` is how many times an attempt is cut at a drawn moment; ``only`` names faults.
    """

    limit_seconds: float = 4.0
    settle_seconds: float = 1.5
    parallel: int = 8
    reads: tuple[str, ...] = ()
    creates: tuple[str, ...] = ()
    record: bytes | None = None
    moments: int = 8
    only: tuple[str, ...] = ()

    @property
    def patience_seconds(self) -> float:
        """Return the limit of an attempt that nothing stalls: a busy machine must not decide."""
        return 10 * self.limit_seconds


@dataclass(frozen=True, slots=True)
class Probe:
    """One record of the proof, as a counter looks for it; ``title`` is the stem of its file."""

    session: str
    title: str
    key: str
    sha256: str


#: Tells how many live copies of a record the server has.
Count = Callable[[Probe], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class Record:
    """A record of the proof on disk; ``earlier`` are the digests of older builds."""

    path: Path
    preview: Path
    session: str
    instrument: str
    sha256: str
    earlier: frozenset[str] = frozenset()

    def probe(self, destination: str) -> Probe:
        """Return what a counter needs to know."""
        return Probe(self.session, self.path.stem, record_key(self.session, destination), self.sha256)


def make_record(folder: Path, content: bytes | None) -> Record:
    """Write a record of a session that nobody has had before; ``content`` stands in for the kit's own."""
    mark = uuid.uuid4().hex[:12]
    session, instrument = f"conformance-{mark}", f"Kit-{mark[:6]}"
    own = _RECORD.format(session=escape(session), instrument=escape(instrument)).encode()
    data = own if content is None else content
    path, preview = folder / f"2026-03-04_Kit_{mark}.xml", folder / f"{mark}.png"
    path.write_bytes(data)
    preview.write_bytes(_PIXEL)
    return Record(path, preview, session, instrument, hashlib.sha256(data).hexdigest())


def build_again(record: Record) -> Record:
    """Write a newer build of the same session: the same file name, other bytes."""
    data = record.path.read_bytes().replace(b"</Experiment>", b"<!-- built again -->\n</Experiment>")
    folder = record.path.parent / f"{record.path.stem}.again"
    folder.mkdir()
    path = folder / record.path.name
    path.write_bytes(data)
    hashes = record.earlier | {record.sha256}
    return replace(record, path=path, sha256=hashlib.sha256(data).hexdigest(), earlier=hashes)


def make_context(record: Record, destination: str, last: LastExport | None, kept: dict[str, Any]) -> ExportContext:
    """Return what the engine would hand on; what is remembered lands in ``kept``."""
    remembered = dict(kept)

    async def save(_facts: Any) -> None:
        kept.clear()
        kept.update(remembered)

    end = _BEGIN + timedelta(minutes=90)
    raw = (f"/data/{record.path.stem}.dm3",)
    return ExportContext(
        xml_file_path=record.path,
        session_identifier=record.session,
        instrument_pid=record.instrument,
        dt_from=_BEGIN,
        dt_to=end,
        user="ada",
        activities=[ContextActivity(raw, raw, (record.preview,), _BEGIN, end, {"Voltage": "300 kV"})],
        reservation_event=Reservation(username="ada", title="Grains", purpose="Grain size < 5 µm?"),
        record_key=record_key(record.session, destination),
        record_sha256=record.sha256,
        purpose="update" if last else "create",
        last_export=last,
        remembered=remembered,
        save_facts=save,
        sent_hashes=record.earlier | {record.sha256},
    )


class Subject:
    """A destination's class with its settings; each case builds an instance of its own.

    Raises ``ConfigurationError`` where the class or its settings do not do.
    """

    def __init__(
        self,
        found: type,
        environment: Environment,
        options: Options,
        *,
        url_setting: str | None = None,
        count: Count | None = None,
    ) -> None:
        self._class = found
        self._environment = environment
        self.options = options
        self.count = count
        self.name = str(getattr(found, "name", found.__name__))
        self.url_setting = url_setting or f"NX_{self.name.upper()}_URL"
        self.secrets = frozenset(self._secrets())
        given = environment.get(self.url_setting)
        self.url = given.text if given else ""
        self.registered = self.build()

    def build(self, url: str | None = None) -> Registered:
        """Make an instance, with another address of its server."""
        settings = self.settings_of(url)
        environment = Environment({name: Value(text, "conformance kit") for name, text in settings.items()})
        built = build(self._class, self.name, environment)
        if isinstance(built, str):
            raise ConfigurationError(built)
        if built.disabled_because:
            raise ConfigurationError(f"{self.name} is not enabled: {built.disabled_because}")
        settle_seconds = min(built.lane.settle_seconds, self.options.settle_seconds)
        lane = replace(built.lane, timeout_seconds=self.options.limit_seconds, settle_seconds=settle_seconds)
        with suppress(AttributeError):  # for one that looks at its own
            built.plugin.settle_seconds = settle_seconds
        return replace(built, lane=lane)

    def settings_of(self, url: str | None) -> dict[str, str]:
        """Return the texts of all settings, with another address of its server."""
        texts = {name: value.text for name, value in self._environment.values.items()}
        return texts if url is None else {**texts, self.url_setting: url}

    def server(self) -> tuple[str, int, bool]:
        """Return host and port of the real server, and whether it speaks TLS."""
        parts = urlsplit(self.url)
        if not parts.hostname:
            raise ConfigurationError(f"{self.url_setting} must be the address of a server; it is {self.url!r}")
        tls = parts.scheme == "https"
        return parts.hostname, parts.port or (443 if tls else 80), tls

    def through(self, port: int) -> str:
        """Return the server's address as it is behind a port of this machine."""
        return f"http://127.0.0.1:{port}{urlsplit(self.url).path}"

    def _secrets(self) -> Iterator[str]:
        model = getattr(self._class, "Settings", None)
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return
        settings = self._environment.read(model, f"NX_{self.name.upper()}_")
        for field in type(settings).model_fields:
            value = getattr(settings, field)
            text = value.get_secret_value() if isinstance(value, SecretStr) else ""
            if len(text) >= _SHORTEST_SECRET:
                yield from {text, quote(text, safe=""), base64.b64encode(text.encode()).decode()}


def resolve(spec: str, environment: Environment, folder: Path | None = None) -> type:
    """Find a class: ``module:Class``, ``file.py:Class``, or the name of a destination that is installed.

    Raises ``ConfigurationError``.
    """
    where, _, name = spec.rpartition(":")
    if not where:
        known = load_registry(environment, folder).known
        if spec not in known:
            raise ConfigurationError(f"there is no destination {spec!r}; known are {', '.join(known)}")
        return type(known[spec].plugin)
    try:
        if where.endswith(".py"):
            module = load_file(Path(where))
        else:
            sys.path.insert(0, str(Path.cwd()))
            module = importlib.import_module(where)
    except (ImportError, OSError, SyntaxError) as error:
        raise ConfigurationError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from None
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise ConfigurationError(f"{where} has no class {name!r}")
    return found


def filled(template: str, probe: Probe) -> str:
    """Put a record into ``{session}``, ``{title}``, ``{key}`` and ``{sha256}`` of a command or an address."""
    values = {"session": probe.session, "title": probe.title, "key": probe.key, "sha256": probe.sha256}
    for name, value in values.items():
        template = template.replace("{" + name + "}", value)
    return template


def count_by_command(template: str) -> Count:
    """Count with a command that prints the number of copies."""

    async def count(probe: Probe) -> int:
        words = [filled(word, probe) for word in shlex.split(template)]
        process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        async with asyncio.timeout(_COUNT_SECONDS):
            output, _ = await process.communicate()
        return int(output.strip())

    return count


def count_by_url(template: str) -> Count:
    """Count with an address that answers the number of copies."""
    if not template.startswith(("http://", "https://")):
        raise ConfigurationError(f"{template!r} is no http address")

    def ask(url: str) -> int:
        with urllib.request.urlopen(url, timeout=_COUNT_SECONDS) as answer:  # noqa: S310 - checked above
            return int(answer.read().strip())

    async def count(probe: Probe) -> int:
        return await asyncio.to_thread(ask, filled(template, probe))

    return count
