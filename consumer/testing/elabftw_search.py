r"""The advanced search of eLabFTW's test server, as far as an exporter needs it. For tests only.

Terms are ``field:value`` and ``extrafield:key:value``, ``s:`` before the value asks for the whole value; they are
joined by blanks, AND, OR, NOT and parentheses. As in SQL, ``%`` and ``_`` are wildcards unless written ``\%`` and
``\_``, and case does not matter.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Entry = Mapping[str, Any]
Test = Callable[[Entry], bool]

_TOKEN = re.compile(r"""\s*(?:([()!|&])|((?:[^\s()"':]+|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|:)+))""")
_PART = re.compile(r""""((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|([^:"']+)""")
_TEXT = {"title": "title", "body": "body", "elabid": "elabid", "category": "category_title", "status": "status_title"}
_NUMBER = {"id": "id", "custom_id": "custom_id", "state": "state", "rating": "rating", "locked": "locked"}
_DATE = {"date": "date", "created_at": "created_at", "timestamped_at": "timestamped_at"}


class SearchError(ValueError):
    """The text is no search."""


def compile_search(text: str) -> Test:
    """Return a function that tells whether an entry is found. Raises ``SearchError``."""
    return _Parser(text).whole()


def like(pattern: str, value: str) -> bool:
    """Compare as SQL's LIKE does."""
    parts = []
    for piece in re.findall(r"\\.|.", pattern, re.DOTALL):
        if piece in {"%", "_"}:
            parts.append(".*" if piece == "%" else ".")
        else:
            parts.append(re.escape(piece[-1] if len(piece) > 1 else piece))
    return re.fullmatch("".join(parts), value, re.IGNORECASE | re.DOTALL) is not None


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        end = len(text.rstrip())
        position = 0
        while position < end:
            found = _TOKEN.match(text, position)
            if not found or found.end() == position:
                raise SearchError(f'Line 1, Column {position + 1}: Expected a term but "{text[position]}" found.')
            self._tokens.append(found[1] or found[2])
            position = found.end()

    def whole(self) -> Test:
        test = self._either()
        if self._tokens:
            raise SearchError(f'Expected the end but "{self._tokens[0]}" found.')
        return test

    def _either(self) -> Test:
        tests = [self._all()]
        while self._tokens and self._tokens[0].upper() in {"OR", "|"}:
            self._tokens.pop(0)
            tests.append(self._all())
        return lambda entry: any(test(entry) for test in tests)

    def _all(self) -> Test:
        tests = [self._one()]
        while self._tokens and self._tokens[0].upper() not in {"OR", "|", ")"}:
            if self._tokens[0].upper() in {"AND", "&"}:
                self._tokens.pop(0)
            tests.append(self._one())
        return lambda entry: all(test(entry) for test in tests)

    def _one(self) -> Test:
        if not self._tokens:
            raise SearchError("Expected a term but end of input found.")
        word = self._tokens.pop(0)
        if word.upper() in {"NOT", "!"}:
            test = self._one()
            return lambda entry: not test(entry)
        if word.upper() in {"AND", "OR", "&", "|", ")"}:
            raise SearchError(f'Expected a term but "{word}" found.')
        if word != "(":
            return _term(word)
        test = self._either()
        if not self._tokens or self._tokens.pop(0) != ")":
            raise SearchError('Expected ")" but end of input found.')
        return test


def _term(token: str) -> Test:
    field, separator, rest = token.partition(":")
    name = field.lower()
    if not separator:
        text = _value(token)
        return lambda entry: any(like(f"%{text}%", str(entry.get(part) or "")) for part in ("title", "body", "date"))
    strict, value = (True, rest[2:]) if rest.startswith("s:") else (False, rest)
    if name == "extrafield":
        return _extra_field(value, strict=strict)
    if name in _TEXT:
        wanted = _value(value) if strict else f"%{_value(value)}%"
        return lambda entry: like(wanted, str(entry.get(_TEXT[name]) or ""))
    if name in _NUMBER:
        return _compared(_NUMBER[name], value, r"[0-9]+")
    if name in _DATE:
        return _compared(_DATE[name], value, r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
    if name in {"owner", "author"}:
        wanted = f"%{_value(value)}%"
        return lambda entry: like(wanted, str(entry.get("fullname") or ""))
    raise SearchError(f'Expected a field but "{field}" found.')


def _value(text: str) -> str:
    """Return a value without its quotes; unquoted it may hold no colon."""
    found = _PART.fullmatch(text)
    if not found:
        raise SearchError(f'Expected a value but "{text}" found.')
    return next(re.sub(r"\\([\"'])", r"\1", part) for part in found.groups() if part is not None)


def _extra_field(text: str, *, strict: bool) -> Test:
    found = _PART.match(text)
    if not found or text[found.end() : found.end() + 1] != ":":
        raise SearchError(f'Expected a field name and a value but "{text}" found.')
    key, value = _value(found[0]).lower(), _value(text[found.end() + 1 :])
    wanted = value if strict else f"%{value}%"

    def test(entry: Entry) -> bool:
        fields = _extra_fields(entry)
        return any(like(wanted, str(item)) for name, item in fields.items() if key in {"**", name.lower()})

    return test


def _extra_fields(entry: Entry) -> dict[str, Any]:
    try:
        metadata = json.loads(entry.get("metadata") or "null")
    except ValueError:
        return {}
    # what was encoded twice is one string to the database, and has no fields
    fields = metadata.get("extra_fields") if isinstance(metadata, dict) else None
    if not isinstance(fields, dict):
        return {}
    return {
        name: field.get("value") for name, field in fields.items() if isinstance(field, dict) and "value" in field
    }


def _compared(name: str, text: str, shape: str) -> Test:
    limits = re.fullmatch(rf"({shape})\.\.({shape})", text)
    single = re.fullmatch(rf"(>=|<=|!=|>|<|=)?({shape})", text)
    if not limits and not single:
        raise SearchError(f'Expected a value of {name} but "{text}" found.')

    def kind(value: Any) -> Any:
        return int(value or 0) if shape == r"[0-9]+" else str(value or "")[:10]

    if limits:
        low, high = kind(limits[1]), kind(limits[2])
        return lambda entry: bool(low <= kind(entry.get(name)) <= high)
    assert single is not None  # noqa: S101 - one of the two has matched
    sign, wanted = single[1] or "=", kind(single[2])
    signs: dict[str, Callable[[Any], bool]] = {
        "=": lambda value: bool(value == wanted),
        "!=": lambda value: bool(value != wanted),
        ">": lambda value: bool(value > wanted),
        "<": lambda value: bool(value < wanted),
        ">=": lambda value: bool(value >= wanted),
        "<=": lambda value: bool(value <= wanted),
    }
    return lambda entry: signs[sign](kind(entry.get(name)))
