"""Plugins: where they are found, what they may look like, and that a broken one takes nobody down."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import consumer.destinations
from consumer.config import Environment, Value
from consumer.destinations.registry import ENTRY_POINTS, Registered, Registry, load_registry
from consumer.errors import ConfigurationError

PLAIN = """
    class {kind}:
        name = "{lower}"
        priority = 50
        enabled = True

        def validate_config(self):
            return True, None

        def export(self, context):
            return None
"""


@pytest.fixture(autouse=True)
def _forget_plugin_modules() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("nexus_export_plugins."):
            del sys.modules[name]


def plain(kind: str = "Plain", /, **attributes: Any) -> str:
    """Return the source of a plugin; ``attributes`` are added to the class, or replace its own."""
    more = "".join(f"\n    {key} = {value!r}" for key, value in attributes.items())
    return textwrap.dedent(PLAIN.format(kind=kind, lower=kind.lower())) + more + "\n"


def load(folder: Path, *sources: str, **environment: str) -> Registry:
    for number, source in enumerate(sources):
        (folder / f"plugin_{number}.py").write_text(textwrap.dedent(source))
    values = {name: Value(text, "environment") for name, text in environment.items()}
    return load_registry(Environment(values), folder)


def only(found: Registry, name: str) -> Registered:
    assert found.problems == ()
    return found.known[name]


def problem(found: Registry) -> str:
    """Return the one problem, with the built-in destinations unharmed."""
    assert {"cdcs", "local_archive"} <= set(found.known)
    (one,) = found.problems
    return one.message


# --- what is found -----------------------------------------------------------------------------------------------


def test_the_built_in_ones_come_by_falling_priority_and_say_why_they_are_off() -> None:
    found = load_registry(Environment({}))
    assert [(item.name, item.priority) for item in found.known.values()] == [
        ("cdcs", 100), ("labarchives", 90), ("elabftw", 85), ("local_archive", 10)
    ]  # fmt: skip
    assert found.known["cdcs"].disabled_because == "NX_CDCS_TOKEN not configured"
    assert found.known["local_archive"].disabled_because == "NX_LOCAL_ARCHIVE_PATH is not set"
    assert found.enabled == {}
    assert found.problems == ()
    assert found.known["cdcs"].can_verify


def test_settings_enable_a_built_in_one(tmp_path: Path) -> None:
    found = load(tmp_path, NX_LOCAL_ARCHIVE_PATH=str(tmp_path / "archive"))
    assert list(found.enabled) == ["local_archive"]
    assert found.known["local_archive"].lane.settle_seconds == 0


def test_a_plugin_written_for_nexuslims(tmp_path: Path) -> None:
    """Its attributes are properties, it knows nothing of lanes, and its package is imported by nobody here."""
    source = '''
        from dataclasses import dataclass, field


        @dataclass
        class Result:
            success: bool
            destination_name: str
            record_id: str = None
            record_url: str = None
            error_message: str = None
            metadata: dict = field(default_factory=dict)


        class SharePointDestination:
            """Uploads to a share."""

            name = "sharepoint"
            priority = 80

            @property
            def enabled(self) -> bool:
                return True

            def validate_config(self):
                return True, None

            def export(self, context):
                return Result(True, self.name, "1")
    '''
    found = load(tmp_path, source)
    item = only(found, "sharepoint")
    assert item.enabled
    assert not item.can_verify
    assert item.origin.endswith("plugin_0.py")
    assert (item.links_to, item.depends_on) == ((), ())
    assert list(found.known) == ["cdcs", "labarchives", "elabftw", "sharepoint", "local_archive"]


def test_an_asynchronous_plugin_with_settings_of_its_own(tmp_path: Path) -> None:
    source = """
        from pydantic import BaseModel, SecretStr
        from nexus_export import ExportResult, Limits, Present

        class Wiki:
            name = "wiki"
            priority = 20
            links_to = ("cdcs",)
            depends_on = ["local_archive"]
            limits = Limits(concurrency=3, min_interval_seconds=1.5, max_attempts=9)
            timeout_seconds = 30
            settle_seconds = 7

            class Settings(BaseModel):
                url: str
                token: SecretStr | None = None

            def __init__(self, settings):
                self.settings = settings
                self.enabled = settings.url.startswith("https")

            async def validate_config(self):
                return True, None

            async def verify(self, context):
                return Present("1")

            async def export(self, context):
                return ExportResult(True, self.name)
    """
    item = only(load(tmp_path, source, NX_WIKI_URL="https://wiki.test", NX_WIKI_TOKEN="t"), "wiki")
    assert item.plugin.settings.url == "https://wiki.test"
    assert item.enabled
    assert item.can_verify
    assert (item.links_to, item.depends_on) == (("cdcs",), ("local_archive",))
    lane = item.lane
    assert (lane.concurrency, lane.min_interval_seconds, lane.max_attempts) == (3, 1.5, 9)
    assert (lane.timeout_seconds, lane.settle_seconds) == (30, 7)
    missing = load(tmp_path)
    assert problem(missing) == "NX_WIKI_URL is not set"


def test_settings_come_before_class_attributes_and_those_before_defaults(tmp_path: Path) -> None:
    source = "from nexus_export import Limits\n" + plain(timeout_seconds=30, settle_seconds=None)
    source += "    limits = Limits(concurrency=3)\n"
    given = {"NX_PLAIN_CONCURRENCY": "1", "NX_PLAIN_TIMEOUT_SECONDS": "2m", "NX_PLAIN_MIN_INTERVAL_SECONDS": "0.5"}
    lane = only(load(tmp_path, source), "plain").lane
    assert (lane.concurrency, lane.timeout_seconds, lane.settle_seconds, lane.max_attempts) == (3, 30, 120, 25)
    lane = only(load(tmp_path, source, **given), "plain").lane
    assert (lane.concurrency, lane.timeout_seconds, lane.min_interval_seconds) == (1, 120, 0.5)
    lane = only(load(tmp_path, source, NX_PLAIN_SETTLE_SECONDS="0", NX_PLAIN_MAX_ATTEMPTS="2"), "plain").lane
    assert (lane.settle_seconds, lane.max_attempts) == (0, 2)


def test_two_classes_in_one_file_and_files_that_begin_with_an_underscore(tmp_path: Path) -> None:
    (tmp_path / "_shared.py").write_text("raise RuntimeError('never imported')\n")
    (tmp_path / "notes.txt").write_text("no Python")
    found = load(tmp_path, plain("One") + plain("Two"))
    assert {"one", "two"} <= set(found.known)
    assert found.problems == ()


def test_a_folder_that_is_not_there_is_a_problem_and_no_error(tmp_path: Path) -> None:
    assert problem(load(tmp_path / "gone")) == "NX_DESTINATIONS_PATH names a folder that is not there"


def test_loading_twice_finds_the_same(tmp_path: Path) -> None:
    first, second = load(tmp_path, plain()), load(tmp_path)
    assert list(first.known) == list(second.known)
    assert second.problems == ()


def test_one_name_alone_needs_no_tuple(tmp_path: Path) -> None:
    assert only(load(tmp_path, plain(links_to="cdcs")), "plain").links_to == ("cdcs",)
    assert only(load(tmp_path, plain(depends_on=None)), "plain").depends_on == ()


# --- what is broken ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import no_such_package_anywhere", "cannot be loaded: ModuleNotFoundError: "),
        ("def broken(:", "cannot be loaded: SyntaxError: "),
        ("raise ValueError('at import')", "cannot be loaded: ValueError: at import"),
        ("import sys; sys.exit(3)", "cannot be loaded: SystemExit: 3"),
        ("\0", "cannot be loaded: "),
        ("x = 1", "holds no class of its own with name, priority, enabled, validate_config, export"),
        (
            "class A:\n    name = 'a'\n    def export(self, context): ...",
            "A lacks priority, enabled, validate_config",
        ),
        (plain() + "    def __init__(self): raise OSError('at start')", "cannot be built: OSError: at start"),
        (plain() + "    def __init__(self, more): ...", "cannot be built: TypeError: "),
        (plain(links_to=7), "cannot be used: TypeError: "),
        (plain(timeout_seconds="soon"), "plain: timeout_seconds of the class: "),
        (plain(timeout_seconds=0), "plain: timeout_seconds of the class: "),
        (plain(settle_seconds=-1), "plain: settle_seconds of the class: "),
        (
            "from nexus_export import Limits\n" + plain() + "    limits = Limits(concurrency=0)",
            "plain: concurrency of the class: ",
        ),
        (plain() + "    @property\n    def name(self): raise KeyError('name')", "cannot be used: KeyError: "),
    ],
)
def test_what_is_broken_is_visible_and_takes_nobody_down(tmp_path: Path, source: str, said: str) -> None:
    assert problem(load(tmp_path, source)).startswith(said)


@pytest.mark.parametrize("name", ["", "Wiki", "1wiki", "wiki-2", "wiki.x", "w" * 101, 7, None, "wikí"])
def test_bad_names(tmp_path: Path, name: Any) -> None:
    assert problem(load(tmp_path, plain(name=name))).startswith(f"name {name!r} must be lower-case letters")


@pytest.mark.parametrize("name", ["w", "wiki_2", "w" * 100])
def test_good_names(tmp_path: Path, name: str) -> None:
    assert only(load(tmp_path, plain(name=name)), name).enabled


@pytest.mark.parametrize("priority", [-1, 1001, 50.0, "50", None])
def test_bad_priorities(tmp_path: Path, priority: Any) -> None:
    assert problem(load(tmp_path, plain(priority=priority))) == (
        f"plain: priority {priority!r} must be a whole number from 0 to 1000"
    )


@pytest.mark.parametrize("priority", [0, 1000])
def test_good_priorities(tmp_path: Path, priority: int) -> None:
    assert only(load(tmp_path, plain(priority=priority)), "plain").priority == priority


def test_a_name_that_is_taken_is_not_used(tmp_path: Path) -> None:
    found = load(tmp_path, plain("One", name="cdcs"), plain("Two"), plain("Three", name="two"))
    assert found.known["cdcs"].origin == "built-in cdcs"
    assert [one.message for one in found.problems] == [
        "the name 'cdcs' is taken by built-in cdcs; this one is not used",
        f"the name 'two' is taken by {tmp_path / 'plugin_1.py'}; this one is not used",
    ]


def test_enabled_that_raises_is_off_and_says_so(tmp_path: Path) -> None:
    source = plain() + "    @property\n    def enabled(self): raise RuntimeError('no licence')\n"
    item = only(load(tmp_path, source), "plain")
    assert not item.enabled
    assert item.disabled_because == "enabled failed: RuntimeError: no licence"


def test_enabled_that_says_no_may_give_its_reason(tmp_path: Path) -> None:
    found = load(
        tmp_path, plain("One", enabled=False), plain("Two", enabled=0, disabled_because="NX_TWO_KEY is not set")
    )
    assert found.known["one"].disabled_because == "not configured"
    assert found.known["two"].disabled_because == "NX_TWO_KEY is not set"
    assert not {"one", "two"} & set(found.enabled)


def test_a_wrong_setting_is_a_problem_of_its_destination_alone(tmp_path: Path) -> None:
    found = load(tmp_path, plain(), NX_PLAIN_CONCURRENCY="many", NX_LOCAL_ARCHIVE_PATH=str(tmp_path))
    assert problem(found).startswith("NX_PLAIN_CONCURRENCY 'many' (environment): Input should be a valid integer")
    assert list(found.enabled) == ["local_archive"]


def test_a_broken_module_among_the_built_in_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin may also be put beside the built-in ones."""
    (tmp_path / "broken_here.py").write_text("raise ImportError('half installed')\n")
    (tmp_path / "whole_here.py").write_text(plain("Whole"))
    folder = consumer.destinations
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    found = load_registry(Environment({}))
    assert problem(found) == "cannot be loaded: ImportError: half installed"
    assert "whole" in found.known
    sys.modules.pop("consumer.destinations.whole_here")


# --- order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attribute", ["links_to", "depends_on"])
def test_an_unknown_name_stops_the_start(tmp_path: Path, attribute: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"plain .*links to or depends on 'gone', .*known are cdcs, elabftw, lab"
    ):
        load(tmp_path, plain(**{attribute: ("gone",)}))


def test_a_plugin_that_failed_to_load_is_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'two', which does not exist"):
        load(tmp_path, plain("One", links_to=("two",)), "raise ValueError")


def test_a_link_to_one_that_is_off_is_no_error(tmp_path: Path) -> None:
    assert only(load(tmp_path, plain(links_to=("cdcs",))), "plain").enabled


@pytest.mark.parametrize(
    ("edges", "circle"),
    [
        ({"one": {"links_to": ("one",)}}, "one -> one"),
        ({"one": {"links_to": ("two",)}, "two": {"depends_on": ("one",)}}, "one -> two -> one"),
        (
            {"one": {"links_to": ("two",)}, "two": {"links_to": ("three",)}, "three": {"depends_on": ("two",)}},
            "two -> three -> two",
        ),
    ],
)
def test_a_circle_stops_the_start(tmp_path: Path, edges: dict[str, dict[str, Any]], circle: str) -> None:
    sources = [plain(name.capitalize(), **declared) for name, declared in edges.items()]
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, *sources)
    assert str(caught.value) == f"destinations wait for each other in a circle: {circle}"


def test_two_ways_to_one_destination_are_no_circle(tmp_path: Path) -> None:
    found = load(
        tmp_path, plain("One"), plain("Two", links_to=("one",)), plain("Three", links_to=("one", "two")),
    )  # fmt: skip
    assert found.problems == ()


# --- entry points ------------------------------------------------------------------------------------------------


def installed(folder: Path, entries: dict[str, str], **modules: str) -> None:
    """Make a folder that looks like one with an installed distribution."""
    info = folder / "lab_plugins-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-plugins\nVersion: 1.0\n")
    lines = [f"[{ENTRY_POINTS}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("labp_"):
            del sys.modules[name]


def test_entry_points_name_classes_or_modules(site: Path) -> None:
    installed(site, {"wiki": "labp_wiki:Wiki", "rest": "labp_rest"}, labp_wiki=plain("Wiki"), labp_rest=plain("Rest"))
    found = load_registry(Environment({}))
    assert only(found, "wiki").origin == "entry point wiki (labp_wiki:Wiki)"
    assert only(found, "rest").origin == "entry point rest (labp_rest)"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("labp_gone:Wiki", "cannot be loaded: ModuleNotFoundError: "),
        ("labp_wiki:Gone", "cannot be loaded: AttributeError: "),
        ("labp_wiki:NUMBER", "is no class"),
        ("labp_wiki:INSTANCE", "is no class"),
        ("labp_wiki:make", "is no class"),
        ("labp_wiki:Half", "Half lacks name, priority, enabled, validate_config"),
        ("labp_empty", "holds no class of its own with "),
    ],
)
def test_a_broken_entry_point_takes_nobody_down(site: Path, value: str, said: str) -> None:
    source = plain("Wiki") + "\nclass Half:\n    export = None\n\ndef make(): ...\nNUMBER, INSTANCE = 7, Wiki()\n"
    installed(site, {"wiki": value}, labp_wiki=source, labp_empty="")
    assert problem(load_registry(Environment({}))).startswith(said)


def test_an_entry_point_is_found_by_the_command_too(site: Path, tmp_path: Path) -> None:
    """The whole way, in a process of its own."""
    installed(site, {"wiki": "labp_wiki:Wiki"}, labp_wiki=plain("Wiki"))
    root = Path(consumer.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "consumer", "destinations"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{site}{os.pathsep}{root}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "wiki" in done.stdout
