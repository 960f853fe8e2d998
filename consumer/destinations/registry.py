"""Finds destinations: built-in ones, entry points of ``nexus_export.destinations``, and a plugin folder.

What fails to load, or has a name that is taken, becomes a visible problem and takes nobody down.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError

import consumer.destinations as built_in_folder
from consumer.config import Environment, LaneSettings
from consumer.destinations.contract import Limits
from consumer.errors import ConfigurationError

ENTRY_POINTS = "nexus_export.destinations"
DEFAULT_TIMEOUT_SECONDS = 120.0
DEFAULT_SETTLE_SECONDS = 120.0

_PARTS = ("name", "priority", "enabled", "validate_config", "export")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,99}")
#: Modules beside the destinations; one that belongs to a destination (``cdcs_rules``) holds no class with ``export``.
_NOT_PLUGINS = {"contract", "registry", "http", "atomic", "archive_layout", "summary"}


@dataclass(frozen=True, slots=True)
class Lane:
    """The limits of one destination's work, settings before class attributes before defaults."""

    concurrency: int
    min_interval_seconds: float
    timeout_seconds: float
    settle_seconds: float
    max_attempts: int


@dataclass(frozen=True, slots=True)
class Registered:
    """A destination that was loaded. ``disabled_because`` is empty when records go there."""

    name: str
    priority: int
    plugin: Any
    lane: Lane
    origin: str
    links_to: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()
    disabled_because: str = ""

    @property
    def enabled(self) -> bool:
        """Tell whether records go there."""
        return not self.disabled_because

    @property
    def paces_requests(self) -> bool:
        """Tell whether the destination waits for its turn before each request, so that attempts need not wait."""
        return bool(getattr(self.plugin, "paces_requests", False))

    @property
    def can_verify(self) -> bool:
        """Tell whether the destination can be asked if a record arrived."""
        return callable(getattr(self.plugin, "verify", None))


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that was found and is not used, and why."""

    origin: str
    message: str


@dataclass(frozen=True, slots=True)
class Registry:
    """All destinations by name, in falling priority; ``problems`` are shown by ``destinations`` and ``doctor``."""

    known: Mapping[str, Registered]
    problems: tuple[Problem, ...] = ()
    _enabled: Mapping[str, Registered] = field(default_factory=dict)

    @property
    def enabled(self) -> Mapping[str, Registered]:
        """Return those that records go to."""
        return self._enabled


def load_registry(environment: Environment, folder: Path | None = None) -> Registry:
    """Find, build and order all destinations.

    Raises ``ConfigurationError`` for an order that cannot be kept: a link or dependency on a name that is not
    there, or a circle of them.
    """
    known: dict[str, Registered] = {}
    problems: list[Problem] = []
    for origin, found in _candidates(folder):
        if isinstance(found, str):
            problems.append(Problem(origin, found))
            continue
        built = build(found, origin, environment)
        if isinstance(built, str):
            problems.append(Problem(origin, built))
        elif built.name in known:
            taken = known[built.name].origin
            problems.append(Problem(origin, f"the name {built.name!r} is taken by {taken}; this one is not used"))
        else:
            known[built.name] = built
    _check_order(known)
    ordered = dict(sorted(known.items(), key=lambda item: (-item[1].priority, item[0])))
    enabled = {name: item for name, item in ordered.items() if item.enabled}
    return Registry(ordered, tuple(problems), enabled)


def _candidates(folder: Path | None) -> Iterator[tuple[str, type | str]]:
    """Yield (origin, class) of everything that looks like a destination, or (origin, problem)."""
    for module in pkgutil.iter_modules(built_in_folder.__path__):
        if module.name not in _NOT_PLUGINS:
            origin, name = f"built-in {module.name}", f"{built_in_folder.__name__}.{module.name}"
            loaded = _guarded(lambda name=name: importlib.import_module(name))
            if isinstance(loaded, _Failure):
                yield origin, f"cannot be loaded: {loaded.message}"
            else:
                yield from _classes(origin, loaded)
    for entry in entry_points(group=ENTRY_POINTS):
        origin = f"entry point {entry.name} ({entry.value})"
        loaded = _guarded(entry.load)
        if isinstance(loaded, _Failure):
            yield origin, f"cannot be loaded: {loaded.message}"
        elif isinstance(loaded, ModuleType):
            yield from _classes(origin, loaded)
        else:
            yield origin, loaded
    if folder is not None:
        yield from _from_folder(folder)


def _from_folder(folder: Path) -> Iterator[tuple[str, type | str]]:
    if not folder.is_dir():
        yield str(folder), "NX_DESTINATIONS_PATH names a folder that is not there"
        return
    for path in sorted(folder.glob("*.py")):
        if path.name.startswith("_"):
            continue
        loaded = _guarded(lambda path=path: load_file(path))
        if isinstance(loaded, _Failure):
            yield str(path), f"cannot be loaded: {loaded.message}"
        else:
            yield from _classes(str(path), loaded)


def load_file(path: Path) -> ModuleType:
    """Import a plugin file under a name of its own. Whatever the file raises passes."""
    name = f"nexus_export_plugins.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        message = "not a Python file"
        raise ImportError(message)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pydantic look their own module up
    spec.loader.exec_module(module)
    return module


def _classes(origin: str, module: ModuleType) -> Iterator[tuple[str, type | str]]:
    own = [item for item in vars(module).values() if inspect.isclass(item) and item.__module__ == module.__name__]
    found = [item for item in own if hasattr(item, "export") and not getattr(item, "_is_protocol", False)]
    for item in found:
        yield origin, item
    if not found and not origin.startswith("built-in"):
        yield origin, f"holds no class of its own with {', '.join(_PARTS)} (subclass what you import)"


@dataclass(frozen=True, slots=True)
class _Failure:
    message: str


def _guarded(call: Any) -> Any:
    """Run foreign code; whatever it raises becomes a value."""
    try:
        return call()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a foreign plugin may raise anything
        return _Failure(f"{type(error).__name__}: {error}")


def build(found: type, origin: str, environment: Environment) -> Registered | str:
    """Make an instance and check the contract; a text says why not."""
    if not inspect.isclass(found):
        return "is no class"
    settings_model = getattr(found, "Settings", None)
    arguments: tuple[Any, ...] = ()
    if inspect.isclass(settings_model) and issubclass(settings_model, BaseModel):
        prefix = f"NX_{str(getattr(found, 'name', found.__name__)).upper()}_"
        try:
            arguments = (environment.read(settings_model, prefix),)
        except ConfigurationError as error:
            return str(error)
    plugin = _guarded(lambda: found(*arguments))
    if isinstance(plugin, _Failure):
        return f"cannot be built: {plugin.message}"
    # hasattr would run a property, which may raise
    absent = object()
    missing = [part for part in _PARTS if inspect.getattr_static(plugin, part, absent) is absent]
    if missing:
        return f"{found.__name__} lacks {', '.join(missing)}"
    registered = _guarded(lambda: _registered(plugin, origin, environment))
    return f"cannot be used: {registered.message}" if isinstance(registered, _Failure) else registered


def _registered(plugin: Any, origin: str, environment: Environment) -> Registered | str:
    name, priority = plugin.name, plugin.priority
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"name {name!r} must be lower-case letters, digits and _ (at most 100), starting with a letter"
    if not isinstance(priority, int) or not 0 <= priority <= 1000:  # noqa: PLR2004 - the bounds of the contract
        return f"{name}: priority {priority!r} must be a whole number from 0 to 1000"
    try:
        lane = _lane(plugin, environment.read(LaneSettings, f"NX_{name.upper()}_"))
    except ConfigurationError as error:
        return str(error)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"{name}: {'.'.join(str(part) for part in first['loc'])} of the class: {first['msg']}"
    enabled = _guarded(lambda: bool(plugin.enabled))
    reason = "" if enabled is True else _why_disabled(plugin, enabled)
    return Registered(
        name=name,
        priority=priority,
        plugin=plugin,
        lane=lane,
        origin=origin,
        links_to=_names(plugin, "links_to"),
        depends_on=_names(plugin, "depends_on"),
        disabled_because=reason,
    )


def _names(plugin: Any, attribute: str) -> tuple[str, ...]:
    """Return declared names; one name alone may be given without a tuple."""
    value = getattr(plugin, attribute, None) or ()
    return (value,) if isinstance(value, str) else tuple(str(name) for name in value)


def _why_disabled(plugin: Any, enabled: Any) -> str:
    if isinstance(enabled, _Failure):
        return f"enabled failed: {enabled.message}"
    reason = getattr(plugin, "disabled_because", None)
    return reason if isinstance(reason, str) and reason else "not configured"


def _lane(plugin: Any, given: LaneSettings) -> Lane:
    limits = getattr(plugin, "limits", None)
    limits = limits if isinstance(limits, Limits) else Limits()
    declared = asdict(limits)
    for part, default in (("timeout_seconds", DEFAULT_TIMEOUT_SECONDS), ("settle_seconds", DEFAULT_SETTLE_SECONDS)):
        value = getattr(plugin, part, None)
        declared[part] = default if value is None else value
    # what a class declares is held to the same bounds as what a setting says
    return Lane(**{**LaneSettings(**declared).model_dump(), **given.model_dump(exclude_none=True)})


def _check_order(known: Mapping[str, Registered]) -> None:
    for item in known.values():
        for target in (*item.links_to, *item.depends_on):
            if target not in known:
                message = (
                    f"destination {item.name} ({item.origin}) links to or depends on {target!r}, which does not "
                    f"exist; known are {', '.join(sorted(known))}"
                )
                raise ConfigurationError(message)
    for name in known:
        circle = _circle(known, name)
        if circle:
            message = f"destinations wait for each other in a circle: {' -> '.join(circle)}"
            raise ConfigurationError(message)


def _circle(known: Mapping[str, Registered], start: str) -> list[str]:
    stack: list[list[str]] = [[start]]
    while stack:
        path = stack.pop()
        item = known[path[-1]]
        for target in (*item.links_to, *item.depends_on):
            if target == start:
                return [*path, start]
            if target not in path:
                stack.append([*path, target])
    return []
