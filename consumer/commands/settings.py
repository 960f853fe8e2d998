"""``config show`` and ``init``: what is set, where it comes from, and a commented file to begin with."""

import difflib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr

from consumer.commands import console
from consumer.config import (
    NEXUSLIMS_ONLY,
    Environment,
    LaneSettings,
    Settings,
    Value,
    is_secret,
    read_env_file,
    variable,
)
from consumer.destinations.registry import Registry
from consumer.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Line:
    """One setting: its name, value as shown, origin and meaning."""

    name: str
    value: str
    origin: str
    meaning: str


def models(registry: Registry) -> Iterator[tuple[type[BaseModel], str]]:
    """Yield every settings model with the prefix of its names."""
    yield Settings, "NX_"
    for item in registry.known.values():
        prefix = f"NX_{item.name.upper()}_"
        own = getattr(type(item.plugin), "Settings", None)
        if inspect.isclass(own) and issubclass(own, BaseModel):
            yield own, prefix
        yield LaneSettings, prefix


def lines(environment: Environment, registry: Registry) -> list[Line]:
    """Return every setting that exists, given or not; values of secrets are hidden."""
    found: dict[str, Line] = {}
    for model, prefix in models(registry):
        for field, info in model.model_fields.items():
            name = variable(model, field, prefix)
            value = environment.lookup(model, field, prefix)
            shown, origin = ("", "default") if value is None else (value.text, value.origin)
            if value is None and info.default is not None and not isinstance(info.default, SecretStr):
                shown = str(info.default)
            if value is not None and is_secret(model, field):
                shown = "(set, hidden)"
            found.setdefault(name, Line(name, shown, origin, info.description or ""))
    return list(found.values())


def show_config(environment: Environment, registry: Registry, *, as_json: bool) -> int:
    """Print all settings with value and origin, then names that nothing reads."""
    found = lines(environment, registry)
    unknown = unknown_names(environment, registry)
    if as_json:
        rows: list[Any] = [{"name": f.name, "value": f.value, "origin": f.origin} for f in found]
        console.print_json({"settings": rows, "unknown": unknown})
        return 0
    console.table(("setting", "value", "origin", "meaning"), [(f.name, f.value, f.origin, f.meaning) for f in found])
    for name, suggestion in unknown.items():
        console.say(f"! {name}: nothing reads it{f'; did you mean {suggestion}?' if suggestion else ''}", "red")
    return 0


def unknown_names(environment: Environment, registry: Registry) -> dict[str, str | None]:
    """Return names that neither this service nor NexusLIMS reads, each with the nearest known name."""
    known = {variable(model, field, prefix) for model, prefix in models(registry) for field in model.model_fields}
    secrets = {
        variable(model, field, prefix) + "_FILE"
        for model, prefix in models(registry)
        for field in model.model_fields
        if is_secret(model, field)
    }
    found: dict[str, str | None] = {}
    for name in sorted(environment.values):
        if name in known or name in secrets or NEXUSLIMS_ONLY.fullmatch(name):
            continue
        near = difflib.get_close_matches(name, known, 1, 0.75)
        found[name] = near[0] if near else None
    return found


def write_env(folder: Path, source: Path | None, registry: Registry) -> int:
    """Write a commented ``.env`` into ``folder``, taking over what a NexusLIMS one sets.

    An existing ``.env`` keeps every line: only what is missing is added at its end, as comments.
    Raises ``ConfigurationError`` when the source cannot be read.
    """
    target = folder / ".env"
    if source is not None and not source.is_file():
        message = f"{source} is no file; give the .env of NexusLIMS with --from"
        raise ConfigurationError(message)
    given = read_env_file(target)
    taken = read_env_file(source) if source is not None else {}
    before = target.read_text(encoding="utf-8") if target.exists() else ""
    new = [line for line in lines(Environment({}), registry) if not _mentions(before, given, taken, line.name)]
    added = "".join(_env_lines(new, taken, registry))
    if added:
        head = (
            "\n# added by nexus-export init\n"
            if before
            else "# nexus-export; every setting: nexus-export config show\n"
        )
        _write_private(target, before + ("" if before.endswith("\n") or not before else "\n") + head + added)
    count = sum(line.name in taken for line in new)
    console.say(
        f"{target} {'completed' if before else 'written'}" + (f"; {count} values taken over" if count else "")
    )
    console.say("next: fill in what is commented out, then  nexus-export doctor  and  nexus-export run")
    return 0


def _mentions(before: str, given: Mapping[str, Value], taken: Mapping[str, Value], name: str) -> bool:
    """Tell whether a file sets a name already, or shows it in a comment and there is no value for it."""
    return name in given or (name not in taken and f"\n# {name}=" in "\n" + before)


def _env_lines(new: Sequence[Line], taken: Mapping[str, Value], registry: Registry) -> Iterator[str]:
    lane_only = {variable(LaneSettings, field, f"NX_{item.name.upper()}_")
                 for item in registry.known.values() for field in LaneSettings.model_fields}  # fmt: skip
    for line in new:
        value = taken.get(line.name)
        if value is None and line.name in lane_only:
            continue
        yield f"\n# {line.meaning or line.name}\n"
        yield f"{line.name}={_quoted(value.text)}\n" if value else f"# {line.name}={line.value}\n"


def _quoted(text: str) -> str:
    if (
        text.replace("_", "").replace("-", "").replace("/", "").replace(".", "").replace(":", "").isalnum()
        or not text
    ):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _write_private(target: Path, text: str) -> None:
    """Replace a file in one step, readable for its owner only: it holds secrets."""
    temporary = target.with_name(f".env.{os.getpid()}.part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)
