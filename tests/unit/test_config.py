"""Settings: where values come from, what they mean, what a person is told, and that no secret is ever shown."""

import json
import stat
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import pytest
from dotenv import dotenv_values
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, Field, SecretStr

from consumer.commands import settings
from consumer.config import (
    Environment,
    LaneSettings,
    Settings,
    Value,
    is_secret,
    read_env_file,
    read_environment,
    variable,
)
from consumer.destinations.registry import Registry, load_registry
from consumer.errors import ConfigurationError
from tests.unit.builders import folder_of_another_user

SECRET = "hunter2-very-secret"


def environment(**values: str) -> Environment:
    return Environment({name: Value(text, "environment") for name, text in values.items()})


def problem(call: Callable[[], Any]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        call()
    return str(caught.value)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry(Environment({}))


# --- where values come from --------------------------------------------------------------------------------------


def test_the_environment_comes_before_env_and_that_before_the_named_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("NX_A=dot\nNX_B=dot\n")
    (tmp_path / "site.env").write_text("NX_A=site\nNX_B=site\nNX_C=site\n")
    found = read_environment({"NX_A": "process", "NX_ENV_FILE": "site.env"}, tmp_path)
    assert found.get("NX_A") == Value("process", "environment")
    assert found.get("NX_B") == Value("dot", str(tmp_path / ".env"))
    assert found.get("NX_C") == Value("site", str(tmp_path / "site.env"))
    assert found.get("NX_D") is None


def test_the_named_file_may_lie_anywhere(tmp_path: Path) -> None:
    elsewhere = tmp_path / "etc" / "nexus.conf"
    elsewhere.parent.mkdir()
    elsewhere.write_text("NX_C=site\n")
    found = read_environment({"NX_ENV_FILE": str(elsewhere)}, tmp_path)
    assert found.get("NX_C") == Value("site", str(elsewhere))


def test_a_named_file_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    said = problem(lambda: read_environment({"NX_ENV_FILE": "gone.env"}, tmp_path))
    assert said == "NX_ENV_FILE names gone.env, which is no file"
    assert read_environment({"NX_ENV_FILE": "  "}, tmp_path).get("NX_ENV_FILE") is None


def test_only_our_names_are_read_and_nothing_is_interpolated(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PATH=/x\nNX_A='a$HOME${HOME}'\nNX_NO_VALUE\n# NX_B=comment\nexport NX_C=c\n")
    found = read_environment({"HOME": "/root"}, tmp_path)
    assert {name: value.text for name, value in found.values.items()} == {"NX_A": "a$HOME${HOME}", "NX_C": "c"}


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"NX_A=\xff\xfe\n")
    assert problem(lambda: read_environment({}, tmp_path)) == f"{tmp_path / '.env'} holds no UTF-8 text"


def test_a_file_that_cannot_be_read_is_named() -> None:
    with folder_of_another_user() as (folder, without_rights):
        (folder / ".env").touch(mode=0o000)
        with without_rights():
            said = problem(lambda: read_environment({}, folder))
    assert said == f"{folder / '.env'} cannot be read: Permission denied"


@pytest.mark.parametrize("text", ["", " ", "\t"])
def test_an_empty_value_counts_as_not_given(text: str) -> None:
    found = environment(NX_EXPORT_STRATEGY=text, NX_AMQP_URL=text, NX_RECORD_SCHEMA=text).read(Settings)
    assert found == Settings()


def test_a_value_of_the_environment_that_is_empty_hides_those_of_the_files(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("NX_EXPORT_STRATEGY=best_effort\n")
    found = read_environment({"NX_EXPORT_STRATEGY": ""}, tmp_path)
    assert found.read(Settings).export_strategy == "all"


# --- secrets in files --------------------------------------------------------------------------------------------


def test_a_secret_may_lie_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{SECRET}\n")
    found = environment(NX_AMQP_URL_FILE=str(path))
    assert found.read(Settings).amqp_url.get_secret_value() == SECRET
    assert found.lookup(Settings, "amqp_url", "NX_") == Value(SECRET, f"file {path}")


def test_a_secret_given_directly_comes_first(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("other")
    found = environment(NX_AMQP_URL="direct", NX_AMQP_URL_FILE=str(tmp_path / "token"))
    assert found.read(Settings).amqp_url.get_secret_value() == "direct"


def test_only_secrets_may_lie_in_files(tmp_path: Path) -> None:
    (tmp_path / "name").write_text("other")
    found = environment(NX_AMQP_EXCHANGE_FILE=str(tmp_path / "name"))
    assert found.read(Settings).amqp_exchange == "nexuslims.records"


def test_a_secret_s_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    found = environment(NX_AMQP_URL_FILE=str(tmp_path / "gone"))
    assert problem(lambda: found.read(Settings)) == (
        f"NX_AMQP_URL_FILE (environment): cannot read {tmp_path / 'gone'}: No such file or directory"
    )
    (tmp_path / "binary").write_bytes(b"\xffhunter2")
    said = problem(lambda: environment(NX_AMQP_URL_FILE=str(tmp_path / "binary")).read(Settings))
    assert said.startswith("NX_AMQP_URL_FILE (environment): ")
    assert said.endswith("holds no UTF-8 text")
    assert "hunter2" not in said


# --- meanings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("1.5", 1.5),
        ("15m", 900),
        ("12h", 43200),
        ("7d", 604800),
        (" 7 d ", 604800),
        ("0", 0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert environment(NX_RECORD_WAIT_SECONDS=text).read(Settings).record_wait_seconds == seconds


@pytest.mark.parametrize("text", ["soon", "-1", "1w", "1e3", "7 d d", "m", "1,5", "inf", "nan", "0x10"])
def test_what_is_no_duration_says_what_one_is(text: str) -> None:
    assert problem(lambda: environment(NX_EXPORT_MAX_WAIT=text).read(Settings)) == (
        f"NX_EXPORT_MAX_WAIT {text!r} (environment): "
        "must be a number of seconds, or a number with s, m, h or d (15m, 7d)"
    )


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("NX_EXPORT_STRATEGY", "some", "Input should be 'all', 'first_success' or 'best_effort'"),
        ("NX_RECORD_MAX_BYTES", "many", "Input should be a valid integer"),
        ("NX_RECORD_MAX_BYTES", "0", "Input should be greater than 0"),
        ("NX_EXPORT_MAX_WAIT", "0", "Input should be greater than 0"),
        ("NX_LOG_LEVEL", "debug", "Input should be 'DEBUG'"),
    ],
)
def test_an_error_names_variable_value_and_origin(tmp_path: Path, name: str, text: str, what: str) -> None:
    (tmp_path / ".env").write_text(f"{name}={text}\n")
    said = problem(lambda: read_environment({}, tmp_path).read(Settings))
    assert said.startswith(f"{name} {text!r} ({tmp_path / '.env'}): {what}")


def test_every_wrong_value_is_told_at_once() -> None:
    said = problem(lambda: environment(NX_EXPORT_STRATEGY="x", NX_RECORD_MAX_BYTES="y").read(Settings))
    assert said.count("(environment)") == 2


def _long(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value()) < 100:
        message = "is too short"
        raise ValueError(message)
    return value


class Guarded(BaseModel):
    """Settings with a secret that has rules."""

    token: Annotated[SecretStr, AfterValidator(_long)] = Field(description="token")
    number: int = Field(1, validation_alias="NX_SHARED_NUMBER")


def test_an_error_never_shows_a_secret(tmp_path: Path) -> None:
    said = problem(lambda: environment(NX_G_TOKEN=SECRET).read(Guarded, "NX_G_"))
    assert said == "NX_G_TOKEN (environment): is too short"
    (tmp_path / "token").write_text(SECRET)
    said = problem(lambda: environment(NX_G_TOKEN_FILE=str(tmp_path / "token")).read(Guarded, "NX_G_"))
    assert said == f"NX_G_TOKEN (file {tmp_path / 'token'}): is too short"


def test_what_is_required_and_missing_is_named() -> None:
    assert problem(lambda: environment().read(Guarded, "NX_G_")) == "NX_G_TOKEN is not set"


def test_a_shared_name_has_no_prefix() -> None:
    assert variable(Guarded, "number", "NX_G_") == "NX_SHARED_NUMBER"
    found = environment(NX_SHARED_NUMBER="7", NX_G_NUMBER="8", NX_G_TOKEN="x" * 100).read(Guarded, "NX_G_")
    assert found.number == 7


def test_what_is_a_secret() -> None:
    assert {name for name in Settings.model_fields if is_secret(Settings, name)} == {"amqp_url", "database_url"}
    assert is_secret(Guarded, "token")


def test_lane_settings_are_read_by_the_name_of_the_destination() -> None:
    found = environment(NX_LAB_CONCURRENCY="3", NX_LAB_TIMEOUT_SECONDS="2m", NX_LAB_SETTLE_SECONDS="0")
    assert found.read(LaneSettings, "NX_LAB_") == LaneSettings(concurrency=3, timeout_seconds=120, settle_seconds=0)
    for name, text in (
        ("CONCURRENCY", "0"),
        ("CONCURRENCY", "1001"),
        ("TIMEOUT_SECONDS", "0"),
        ("MAX_ATTEMPTS", "0"),
    ):
        wrong = environment(**{f"NX_LAB_{name}": text})
        assert problem(partial(wrong.read, LaneSettings, "NX_LAB_")).startswith(f"NX_LAB_{name} '{text}'")


def test_paths_that_follow_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    alone = Settings()
    assert alone.resolved_records_path is None
    assert alone.resolved_database_url == f"sqlite+aiosqlite:///{tmp_path}/nexus-export.db"
    assert alone.resolved_spool_path == tmp_path / "nexus-export-spool"
    data = Settings(data_path=Path("/data"))
    assert data.resolved_records_path == Path("/data/records")
    assert data.resolved_database_url == "sqlite+aiosqlite:////data/nexus-export.db"
    assert data.resolved_spool_path == Path("/data/nexus-export-spool")
    assert Settings(data_path=Path("/data"), records_path=Path("/r")).resolved_records_path == Path("/r")
    assert Settings(spool_path=Path("/s")).resolved_spool_path == Path("/s")


@pytest.mark.parametrize(
    ("given_url", "resolved"),
    [
        ("sqlite:////var/x.db", "sqlite+aiosqlite:////var/x.db"),
        ("postgresql://u:p@h/d?x=1", "postgresql+asyncpg://u:p@h/d?x=1"),
        ("postgres://h/d", "postgresql+asyncpg://h/d"),
        ("postgresql+asyncpg://h/d", "postgresql+asyncpg://h/d"),
        ("nonsense", "nonsense"),
    ],
)
def test_database_addresses_get_their_driver(given_url: str, resolved: str) -> None:
    assert Settings(database_url=SecretStr(given_url)).resolved_database_url == resolved


def test_the_spool_lies_beside_a_sqlite_file() -> None:
    assert Settings(database_url=SecretStr("sqlite:////var/x.db")).resolved_spool_path == Path(
        "/var/nexus-export-spool"
    )


# --- config show -------------------------------------------------------------------------------------------------


def shown(found: Environment, registry: Registry, capsys: pytest.CaptureFixture[str]) -> Any:
    assert settings.show_config(found, registry, as_json=True) == 0
    return json.loads(capsys.readouterr().out)


def test_config_show_tells_value_and_origin_and_hides_secrets(
    registry: Registry, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    found = environment(
        NX_AMQP_URL=f"amqp://u:{SECRET}@h/", NX_CDCS_TOKEN_FILE=str(tmp_path / "secret"), NX_EXPORT_STRATEGY="all",
    )  # fmt: skip
    everything = shown(found, registry, capsys)
    rows = {row["name"]: row for row in everything["settings"]}
    assert SECRET not in json.dumps(everything)
    assert rows["NX_AMQP_URL"]["value"] == rows["NX_CDCS_TOKEN"]["value"] == "(set, hidden)"
    assert rows["NX_CDCS_TOKEN"]["origin"] == f"file {tmp_path / 'secret'}"
    assert (rows["NX_EXPORT_STRATEGY"]["value"], rows["NX_EXPORT_STRATEGY"]["origin"]) == ("all", "environment")
    assert (rows["NX_AMQP_EXCHANGE"]["value"], rows["NX_AMQP_EXCHANGE"]["origin"]) == ("nexuslims.records", "default")
    assert {"NX_CDCS_URL", "NX_LOCAL_ARCHIVE_PATH", "NX_CDCS_MAX_ATTEMPTS", "NX_DISABLE_SSL_VERIFY"} <= set(rows)
    settings.show_config(found, registry, as_json=False)
    assert SECRET not in capsys.readouterr().out
    # neither is the password in the default address
    assert rows["NX_DATABASE_URL"]["value"] == ""
    assert not [row for row in shown(environment(), registry, capsys)["settings"] if "guest:guest" in row["value"]]


def test_names_that_nothing_reads_get_a_suggestion(
    registry: Registry, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("x")
    found = environment(
        NX_CDCS_TOKN="x", NX_EXPORT_STRATAGY="x", NX_SOMETHING_ELSE="x", NX_CDCS_URL_FILE="x",
        NX_CDCS_TOKEN_FILE=str(tmp_path / "token"),
    )  # fmt: skip
    unknown = settings.unknown_names(found, registry)
    assert unknown == {
        "NX_CDCS_TOKN": "NX_CDCS_TOKEN",
        "NX_EXPORT_STRATAGY": "NX_EXPORT_STRATEGY",
        "NX_SOMETHING_ELSE": None,
        "NX_CDCS_URL_FILE": unknown["NX_CDCS_URL_FILE"],
    }
    settings.show_config(found, registry, as_json=False)
    told = capsys.readouterr().out
    assert "NX_CDCS_TOKN: nothing reads it; did you mean NX_CDCS_TOKEN?" in told
    assert "NX_SOMETHING_ELSE: nothing reads it\n" in told


def test_names_of_nexuslims_are_known(registry: Registry) -> None:
    names = [
        "NX_DATA_PATH",
        "NX_INSTRUMENT_DATA_PATH",
        "NX_DB_PATH",
        "NX_RECORDS_PATH",
        "NX_LOG_PATH",
        "NX_LOCAL_PROFILES_PATH",
        "NX_CDCS_URL",
        "NX_CDCS_TOKEN",
        "NX_CDCS_USER_OWNED_RECORDS",
        "NX_CDCS_ASSIGN_TO_PUBLIC_WORKSPACE",
        "NX_ELABFTW_API_KEY",
        "NX_ELABFTW_URL",
        "NX_LABARCHIVES_ACCESS_KEY_ID",
        "NX_EXPORT_STRATEGY",
        "NX_CERT_BUNDLE",
        "NX_CERT_BUNDLE_FILE",
        "NX_DISABLE_SSL_VERIFY",
        "NX_EMAIL_SMTP_HOST",
        "NX_FILE_STRATEGY",
        "NX_IGNORE_PATTERNS",
        "NX_FILE_DELAY_DAYS",
        "NX_CLUSTERING_SENSITIVITY",
        "NX_NEMO_ADDRESS_1",
        "NX_NEMO_TOKEN_1",
        "NX_ENV_FILE",
    ]
    assert settings.unknown_names(environment(**dict.fromkeys(names, "x")), registry) == {}


# --- init --------------------------------------------------------------------------------------------------------


def test_init_writes_a_commented_file_for_its_owner_alone(
    tmp_path: Path, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settings.write_env(tmp_path, None, registry) == 0
    target = tmp_path / ".env"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert read_env_file(target) == {}, "everything is a comment"
    text = target.read_text()
    assert "# NX_EXPORT_STRATEGY=all\n" in text
    assert "\n# API token\n# NX_CDCS_TOKEN=\n" in text
    assert "NX_CDCS_MAX_ATTEMPTS" not in text, "what a laboratory never touches"
    assert "guest" not in text
    assert ".env written" in capsys.readouterr().out.replace("\n", "")
    assert list(tmp_path.iterdir()) == [target]


def test_init_takes_over_what_nexuslims_sets(
    tmp_path: Path, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "old" / "nexuslims-site.env"
    source.parent.mkdir()
    (source.parent / ".env").write_text("NX_CDCS_URL=https://wrong.test\n")
    source.write_text(
        "NX_CDCS_URL='https://cdcs.test/'\nNX_CDCS_TOKEN=\"a b#c'd\\\\e\"\n"
        "NX_NEMO_ADDRESS_1=x\nNX_CDCS_MAX_ATTEMPTS=7\n"
    )
    settings.write_env(tmp_path, source, registry)
    found = {name: value.text for name, value in read_env_file(tmp_path / ".env").items()}
    assert found == {
        "NX_CDCS_URL": "https://cdcs.test/",
        "NX_CDCS_TOKEN": "a b#c'd\\e",
        "NX_CDCS_MAX_ATTEMPTS": "7",
    }
    assert "3 values taken over" in capsys.readouterr().out
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600


def test_init_keeps_every_line_that_is_there(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "old.env").write_text("NX_CDCS_URL=https://old.test/\nNX_CDCS_TOKEN=taken\n")
    target = tmp_path / ".env"
    before = "# mine\nNX_CDCS_URL=https://mine.test/\nOTHER=1"
    target.write_text(before)
    target.chmod(0o644)
    settings.write_env(tmp_path, tmp_path / "old.env", registry)
    text = target.read_text()
    assert text.startswith(before + "\n")
    assert text.count("NX_CDCS_URL") == 1
    assert {name: value.text for name, value in read_env_file(target).items()} == {
        "NX_CDCS_URL": "https://mine.test/",
        "NX_CDCS_TOKEN": "taken",
    }
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_init_twice_changes_nothing(tmp_path: Path, registry: Registry) -> None:
    settings.write_env(tmp_path, None, registry)
    once = (tmp_path / ".env").read_text()
    settings.write_env(tmp_path, None, registry)
    assert (tmp_path / ".env").read_text() == once
    (tmp_path / "old.env").write_text("NX_CDCS_TOKEN=taken\n")
    settings.write_env(tmp_path, tmp_path / "old.env", registry)
    assert (tmp_path / ".env").read_text().startswith(once)
    assert read_env_file(tmp_path / ".env")["NX_CDCS_TOKEN"].text == "taken"


def test_init_from_a_file_that_is_not_there(tmp_path: Path, registry: Registry) -> None:
    said = problem(lambda: settings.write_env(tmp_path, tmp_path / "gone", registry))
    assert said == f"{tmp_path / 'gone'} is no file; give the .env of NexusLIMS with --from"
    assert not (tmp_path / ".env").exists()


printable = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)


@given(printable)
def test_what_init_writes_is_read_back(text: str) -> None:
    line = f"NX_A={settings._quoted(text)}\n"  # noqa: SLF001 - the one rule that has no door of its own
    assert dotenv_values(stream=StringIO(line), interpolate=False) == {"NX_A": text}
