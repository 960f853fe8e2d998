"""The container files fit the project: every setting, command, path and variable that they name exists."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from consumer.commands import settings
from consumer.config import Environment, is_secret, variable
from consumer.destinations.registry import load_registry
from consumer.main import app
from consumer.store import schema

PROJECT = Path(__file__).parents[2]
COMPOSE_TEXT = (PROJECT / "docker-compose.yml").read_text(encoding="utf-8")
DOCKERFILE = (PROJECT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
COMPOSE: Mapping[str, Any] = yaml.safe_load(COMPOSE_TEXT)
SERVICES: Mapping[str, Any] = COMPOSE["services"]
HEAD = "\n".join(line for line in COMPOSE_TEXT.splitlines() if line.startswith("#"))
PINNED = re.compile(r"[\w./-]+:\d+\.\d+(\.\d+)?(-[\w-]+)?")


def instructions(name: str) -> Iterator[str]:
    """Yield what follows an instruction of the Dockerfile, each time it is there."""
    for line in DOCKERFILE.splitlines():
        word, _, rest = line.partition(" ")
        if word == name:
            yield rest.strip()


def command_of(text: str) -> list[str]:
    """Read a command in its JSON form."""
    command = json.loads(text)
    assert isinstance(command, list)
    return command


def settings_names() -> set[str]:
    """Return every setting that exists, secrets also as files."""
    names = set()
    for model, prefix in settings.models(load_registry(Environment({}))):
        for field in model.model_fields:
            name = variable(model, field, prefix)
            names |= {name, f"{name}_FILE"} if is_secret(model, field) else {name}
    return names


def test_all_services_are_there() -> None:
    assert set(SERVICES) == {"rabbitmq", "postgres", "consumer"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_restarts_ends_in_order_and_is_watched(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["stop_grace_period"] == "15s"
    assert service["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", ["rabbitmq", "postgres"])
def test_a_server_is_pinned_by_version(name: str) -> None:
    assert PINNED.fullmatch(SERVICES[name]["image"])


def test_the_servers_are_the_ones_that_the_readme_names() -> None:
    assert re.match(r"rabbitmq:4\.[\d.]+-management$", SERVICES["rabbitmq"]["image"])
    assert re.match(r"postgres:17\.\d+$", SERVICES["postgres"]["image"])


def test_the_image_of_the_consumer_has_the_version_of_the_project() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert SERVICES["consumer"]["image"] == f"{project['name']}:{project['version']}"


def test_the_consumer_waits_for_both_servers() -> None:
    waits = {name: how["condition"] for name, how in SERVICES["consumer"]["depends_on"].items()}
    assert waits == {"rabbitmq": "service_healthy", "postgres": "service_healthy"}


def test_every_setting_exists() -> None:
    named = set(re.findall(r"\bNX_[A-Z_]*[A-Z]\b", COMPOSE_TEXT + DOCKERFILE))
    assert {"NX_AMQP_URL", "NX_DATABASE_URL"} <= set(SERVICES["consumer"]["environment"])
    assert named <= settings_names()


def test_every_variable_is_documented_and_has_a_default_or_says_that_it_is_missing() -> None:
    used = set(re.findall(r"\$\{?(\w+)", COMPOSE_TEXT))
    guarded = set(re.findall(r"\$\{(\w+)(?::-[^}]+|:\?[^}]+)\}", COMPOSE_TEXT))
    assert used == guarded
    assert {name for name in used if not re.search(rf"^#   {name} ", HEAD, re.MULTILINE)} == set()


def test_ports_are_open_on_this_machine_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_data_is_at_the_same_path_inside_as_outside_and_raw_data_is_read_only() -> None:
    mounts = []
    for mount in SERVICES["consumer"]["volumes"]:
        found = re.fullmatch(r"(\$\{[^}]+\}):(\$\{[^}]+\})(:ro)?", mount)
        assert found
        assert found[1] == found[2]
        mounts.append((re.findall(r"\w+", mount)[0], bool(found[3])))
    assert mounts == [("NX_DATA_PATH", False), ("NX_INSTRUMENT_DATA_PATH", True)]


def test_the_data_of_the_servers_survives_their_containers() -> None:
    for name in ("rabbitmq", "postgres"):
        volume = SERVICES[name]["volumes"][0].partition(":")[0]
        assert volume in COMPOSE["volumes"]
    assert SERVICES["rabbitmq"]["hostname"], "RabbitMQ files its data under its host name"


def test_there_is_no_secret_in_it() -> None:
    assert [entry["path"] for entry in SERVICES["consumer"]["env_file"]] == [".env"]
    plain = re.sub(r"#.*|\$\{[^}]+\}", "", COMPOSE_TEXT)
    assert not re.search(r"(?i)(pass|token|secret)\w* *[:=] *\S", plain)
    assert not re.search(r"://\w*:[^@\s]+@", plain)
    assert not re.search(r"(?i)password|token|secret", DOCKERFILE)
    assert "**/.env" in (PROJECT / ".dockerignore").read_text(encoding="utf-8").splitlines()


def test_the_base_images_are_pinned_and_the_same() -> None:
    images = [text.partition(" AS ")[0] for text in instructions("FROM")]
    assert len(images) == 2
    assert len(set(images)) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim[\w-]*", images[0])


def test_what_the_dockerfile_copies_exists_and_is_not_ignored() -> None:
    ignore = (PROJECT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [
        word
        for text in instructions("COPY")
        if not text.startswith("--from")
        for word in text.split()[:-1]
    ]  # fmt: skip
    assert sources
    for source in sources:
        assert (PROJECT / source).exists()
        assert f"!{source}" in ignore


def test_the_requirements_are_installed_with_hashes() -> None:
    installs = re.findall(r"pip install (.*?)(?:&&|$)", DOCKERFILE, re.MULTILINE)
    assert len(installs) == 3
    for install in installs[:2]:
        path = install.split()[-1]
        assert "--require-hashes" in install
        assert "--hash=sha256:" in (PROJECT / path).read_text(encoding="utf-8")
    assert installs[2].split() == ["--no-deps", "/dist/*.whl"]


def test_the_entry_point_and_its_commands_exist() -> None:
    scripts = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    commands = typer.main.get_group(app).commands
    (entry,) = (command_of(text) for text in instructions("ENTRYPOINT"))
    (start,) = (command_of(text) for text in instructions("CMD"))
    (health,) = (command_of(text.partition("CMD ")[2]) for text in instructions("HEALTHCHECK"))
    assert entry[0] in scripts
    assert start[0] in commands
    assert health[0] in scripts
    assert health[1] in commands
    assert SERVICES["consumer"]["healthcheck"]["test"] == ["CMD", *health]


def test_the_consumer_is_not_root() -> None:
    (user,) = instructions("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"useradd --uid {user.partition(':')[0]} " in DOCKERFILE
    assert SERVICES["consumer"]["user"] == f"${{CONSUMER_USER:-{user}}}"


def test_the_migrations_go_into_the_wheel_where_the_program_looks_first() -> None:
    tool = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    wheel = tool["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"migrations": "consumer/migrations"}
    assert schema.head()
