"""Events that come in and go out: CloudEvents 1.0 over AMQP, and the data inside them.

``parse_built`` turns the body and headers of a delivery into a frozen ``BuiltEvent`` or raises
``PoisonEventError``; ``outcome_body`` writes what listeners get. The models are also the source of the JSON
Schemas and the AsyncAPI document in ``docs/reference``.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    Tag,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import from_json, to_json

from consumer.cloudevents import readable, refuse_unstorable, structured_document
from consumer.errors import PoisonEventError

BUILT = "record.built"
EXPORTED = "record.exported"
EXPORT_FAILED = "record.export_failed"
STRUCTURED_TYPE = "application/cloudevents+json"
SCHEMA_BASE = "urn:nexus-export:schema:"
INLINE_LIMIT_BYTES = 1024 * 1024
REPLAY_HEADER = "nexus-replay-of"

_CACHED_TEXT = 8192


def _only_text(value: Any) -> Any:
    """Refuse numbers as times, also those in a text: a bare 0 would silently mean 1970."""
    if not isinstance(value, datetime) and not (isinstance(value, str) and _DATE.match(value)):
        message = "must be an RFC 3339 text with a zone"
        raise ValueError(message)
    return value


def _has_utc(value: datetime) -> datetime:
    """Refuse the first and last hours of the calendar that have no UTC: the store keeps UTC."""
    try:
        value.astimezone(UTC)
    except OverflowError:
        message = "must be a time between the years 1 and 9999 in UTC"
        raise ValueError(message) from None
    return value


_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ]")

Moment = Annotated[AwareDatetime, BeforeValidator(_only_text), AfterValidator(_has_utc)]
_MOMENT: TypeAdapter[datetime] = TypeAdapter(Moment)
Name = Annotated[str, StringConstraints(min_length=1, max_length=255)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$", to_lower=True)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class RecordByPath(_Frozen):
    """A record file, relative to ``NX_RECORDS_PATH``."""

    path: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    sha256: Sha256
    size: Annotated[StrictInt, Field(ge=0)]


class RecordInline(_Frozen):
    """A record inside the event, up to 1 MiB as UTF-8."""

    name: Name
    content: str
    sha256: Sha256
    size: Annotated[StrictInt, Field(ge=0)]


def _record_kind(value: Any) -> str:
    inline = "content" in value if isinstance(value, Mapping) else isinstance(value, RecordInline)
    return "inline" if inline else "path"


class Activity(_Frozen):
    """One acquisition activity: its files (only named), their previews, its time and its setup."""

    files: tuple[str, ...] = ()
    previews: tuple[str | None, ...] = ()
    start: Moment | None = None
    end: Moment | None = None
    setup: dict[str, Any] = Field(default_factory=dict)


class Reservation(_Frozen):
    """The calendar reservation of the session; every field may be missing."""

    username: str | None = None
    user_email: str | None = None
    user_first_name: str | None = None
    user_last_name: str | None = None
    title: str | None = None
    purpose: str | None = None
    samples: tuple[Any, ...] = ()
    projects: tuple[Any, ...] = ()
    url: str | None = None


class RecordBuilt(_Frozen):
    """Data of ``record.built``. What is missing is read from the record itself."""

    session_identifier: Name
    record: Annotated[
        Annotated[RecordByPath, Tag("path")] | Annotated[RecordInline, Tag("inline")],
        Discriminator(_record_kind),
    ]
    instrument_pid: Name | None = None
    dt_from: Moment | None = None
    dt_to: Moment | None = None
    user: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    activities: tuple[Activity, ...] = ()
    reservation: Reservation | None = None
    destinations: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    strategy: str | None = None


class Envelope(_Frozen):
    """The CloudEvents attributes that matter here; unknown extensions are kept in the stored event."""

    specversion: Literal["1.0"]
    id: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    source: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    type: Annotated[str, StringConstraints(min_length=1)]
    subject: str | None = None
    time: Moment | None = None
    dataschema: str | None = None
    traceparent: str | None = None


class DestinationResult(_Frozen):
    """What became of the record at one destination."""

    destination: str
    success: StrictBool
    skipped: StrictBool = False
    action: Literal["created", "updated", "unchanged", "linked", "none"] = "none"
    record_id: str | None = None
    record_url: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    next_action: Literal["none", "replay", "fix_config", "fix_record"] = "none"
    attempts: int = 0
    timestamp: Moment | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class Cause(_Frozen):
    """The event that an outcome answers."""

    source: str
    id: str


class Outcome(_Frozen):
    """Data of ``record.exported`` and ``record.export_failed``.

    ``results`` are in the order tried. Of several outcomes of one job the highest ``revision`` holds.
    ``error_code`` is set where no destination was tried at all (``invalid_event``, ``no_destination``).
    """

    session_identifier: str
    status: Literal["COMPLETED", "BUILT_NOT_EXPORTED"]
    revision: int
    strategy: str
    cause: Cause
    superseded_by: Cause | None = None
    user: str | None = None
    instrument_pid: str | None = None
    dt_from: Moment | None = None
    dt_to: Moment | None = None
    record: dict[str, Any] = Field(default_factory=dict)
    results: tuple[DestinationResult, ...] = ()
    error_code: str | None = None
    error_message: str | None = None


@dataclass(frozen=True, slots=True)
class BuiltEvent:
    """A valid ``record.built``. ``text`` is the whole event as one structured JSON document."""

    source: str
    id: str
    time: datetime | None
    data: RecordBuilt
    data_sha256: str
    text: str
    traceparent: str | None = None

    @property
    def job_id(self) -> uuid.UUID:
        """The job of this event: the same event always names the same job."""
        return job_id(self.source, self.id)


@lru_cache(maxsize=1024)
def job_id(source: str, event_id: str) -> uuid.UUID:
    """Name the job of an event: uuid5 of the event id in the namespace of its source."""
    return uuid.uuid5(_namespace(source), event_id)


@lru_cache(maxsize=256)
def _namespace(source: str) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_URL, source)


def outcome_id(job: uuid.UUID, revision: int) -> uuid.UUID:
    """Name an outcome: the same revision of a job is always the same message."""
    return uuid.uuid5(job, str(revision))


def parse_built(body: bytes, *, content_type: str | None, headers: Mapping[str, Any]) -> BuiltEvent:
    """Read a delivery in structured or binary mode.

    Raises ``PoisonEventError`` with a code and a sentence that says what is wrong and where.
    """
    document, structured = structured_document(body, content_type, headers)
    known = readable(document)
    try:
        envelope = Envelope.model_validate(document)
    except ValidationError as error:
        raise PoisonEventError("not_cloudevent", _sentence(error), **known) from None
    if envelope.type != BUILT:
        raise PoisonEventError("unknown_type", f"type is {envelope.type!r}; this queue takes {BUILT!r}", **known)
    refuse_unstorable(body if structured else None, document, known)
    try:
        data = RecordBuilt.model_validate(document.get("data"))
    except ValidationError as error:
        raise PoisonEventError("invalid_data", _sentence(error, "data"), **known) from None
    canonical = json.dumps(document["data"], sort_keys=True, separators=(",", ":")).encode()
    return BuiltEvent(
        source=envelope.source,
        id=envelope.id,
        time=envelope.time,
        data=data,
        data_sha256=hashlib.sha256(canonical).hexdigest(),
        # a structured body is kept as it came
        text=body.decode() if structured else to_json(document).decode(),
        traceparent=envelope.traceparent,
    )


def read_moment(text: str) -> datetime:
    """Read a time as events hold it. Raises ``ValueError``."""
    return _MOMENT.validate_python(text)


def restore_built(text: str) -> BuiltEvent:
    """Read an event back that ``parse_built`` accepted before.

    Each stage of a record asks for it, so small ones stay in memory for a while.
    """
    return _restore_cached(text) if len(text) <= _CACHED_TEXT else _restore(text)


def _restore(text: str) -> BuiltEvent:
    document = from_json(text)
    time = document.get("time")
    return BuiltEvent(
        source=document["source"],
        id=document["id"],
        # the same reader as in parse_built: Python's own one takes fewer forms of RFC 3339
        time=read_moment(time) if time else None,
        data=RecordBuilt.model_validate(document["data"]),
        data_sha256="",
        text=text,
        traceparent=document.get("traceparent"),
    )


_restore_cached = lru_cache(maxsize=512)(_restore)


def _sentence(error: ValidationError, root: str | None = None) -> str:
    """Say the first problem as ``where: what``."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    parts = [str(part) for part in first["loc"]]
    if parts[:1] == ["record"] and parts[1:2] in (["path"], ["inline"]):
        del parts[1]  # the tag of the union, which no event holds
    where = ".".join([root, *parts] if root else parts)
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def outcome_type(outcome: Outcome) -> str:
    """Return the event type (and routing key) that announces this outcome."""
    return EXPORTED if outcome.status == "COMPLETED" else EXPORT_FAILED


def outcome_body(outcome: Outcome, *, event_id: str, source: str, time: datetime, traceparent: str | None) -> bytes:
    """Write an outcome as a structured CloudEvent."""
    kind = outcome_type(outcome)
    document: dict[str, Any] = {
        "specversion": "1.0",
        "id": event_id,
        "source": source,
        "type": kind,
        "subject": outcome.session_identifier,
        "time": time,
        "datacontenttype": "application/json",
        "dataschema": f"{SCHEMA_BASE}{kind}:1",
    }
    if traceparent:
        document["traceparent"] = traceparent
    document["data"] = outcome
    return to_json(document)


def built_body(
    data: RecordBuilt, *, event_id: str, source: str, time: datetime, traceparent: str | None = None
) -> bytes:
    """Write a ``record.built`` as a structured CloudEvent, for builders and for the commands."""
    document: dict[str, Any] = {
        "specversion": "1.0",
        "id": event_id,
        "source": source,
        "type": BUILT,
        "subject": data.session_identifier,
        "time": time,
        "datacontenttype": "application/json",
        "dataschema": f"{SCHEMA_BASE}{BUILT}:1",
    }
    if traceparent:
        document["traceparent"] = traceparent
    document["data"] = data.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    return to_json(document)
