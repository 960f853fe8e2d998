"""The settings that a destination cannot do without, and the words for one that is missing."""

from collections.abc import Mapping

from pydantic import SecretStr


def not_given(needed: Mapping[str, SecretStr | str | None]) -> str:
    """Name the first setting that is not given, or given empty; an empty text when all are there."""
    for name, value in needed.items():
        if not (value.get_secret_value() if isinstance(value, SecretStr) else value):
            return f"{name} not configured" if value is None else f"{name} is empty"
    return ""
