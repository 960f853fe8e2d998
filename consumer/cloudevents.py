"""Reading CloudEvents 1.0 from AMQP 0.9.1: both content modes become one structured document.

The names follow the AMQP 1.0 binding of CloudEvents: attributes as headers with the prefix ``cloudEvents_`` or
``cloudEvents:``, binary mode unless the content type begins with ``application/cloudevents``.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic_core import from_json

from consumer.errors import PoisonEventError

_PREFIXES = ("cloudEvents_", "cloudEvents:")
_ATTRIBUTES = ("id", "source", "type", "specversion", "subject", "time", "dataschema", "traceparent")


def structured_document(
    body: bytes, content_type: str | None, headers: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Bring both content modes into one structured document; tells whether it came as one."""
    try:
        document = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise PoisonEventError(
            "not_json", f"the body is not JSON: {error}", **readable(_header_attributes(headers))
        ) from None
    if isinstance(document, dict) and "specversion" in document:
        return document, True
    attributes = _header_attributes(headers)
    if attributes and not (content_type or "").startswith("application/cloudevents"):
        return {**attributes, "data": document}, False
    known = readable(document) if isinstance(document, dict) else {}
    raise PoisonEventError(
        "not_cloudevent",
        "neither a JSON object with specversion nor a message with cloudEvents_ headers",
        **{**known, "session": known.get("session") or _session(document)},
    )


def _header_attributes(headers: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for prefix in _PREFIXES:
        for name in _ATTRIBUTES:
            value = headers.get(prefix + name)
            if value is not None:
                found[name] = value.isoformat() if isinstance(value, datetime) else value
    return found


def readable(document: Mapping[str, Any]) -> dict[str, str | None]:
    """Collect what can be told to the builder even if the event is refused."""

    def text(value: Any) -> str | None:
        usable = isinstance(value, str) and 0 < len(value) <= 1024 and "\0" not in value  # noqa: PLR2004
        return value if usable else None

    session = _session(document.get("data")) or text(document.get("subject"))
    return {
        "source": text(document.get("source")),
        "event_id": text(document.get("id")),
        "session": session,
    }


def _session(data: Any) -> str | None:
    value = data.get("session_identifier") if isinstance(data, Mapping) else None
    return value if isinstance(value, str) and 0 < len(value) <= 255 and "\0" not in value else None  # noqa: PLR2004


def refuse_unstorable(body: bytes | None, document: Any, known: dict[str, str | None]) -> None:
    """NUL cannot be stored in PostgreSQL nor sent in XML; a lone surrogate cannot be encoded at all.

    The JSON reader refuses lone surrogates itself; NUL can only come as an escape, so most bodies need no walk.
    ``body`` is None in binary mode, where headers may hold one too.
    """
    if body is not None and b"\\u0000" not in body:
        return
    stack = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, str) and "\0" in value:
            raise PoisonEventError("invalid_text", "a text holds a NUL character", **known)
        if isinstance(value, Mapping):
            stack.extend(value.keys())
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
