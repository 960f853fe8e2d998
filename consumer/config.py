"""Settings: where they come from, what they mean, and their bounds.

Values come from the process environment, then ``.env`` in the working folder, then the file that
``NX_ENV_FILE`` names; the first one that has a name wins. A secret may also be given as the path of a file
in ``NX_..._FILE``. python-dotenv reads the files and pydantic checks the values; pydantic-settings is not used
because ``config show`` tells the origin of each value, which it does not keep.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from dotenv import dotenv_values
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from consumer.errors import ConfigurationError

Model = TypeVar("Model", bound=BaseModel)

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

#: Names that NexusLIMS 2.8.0 reads and this service does not: known, never reported as a typing error.
NEXUSLIMS_ONLY = re.compile(
    r"NX_(FILE_STRATEGY|IGNORE_PATTERNS|DB_PATH|FILE_DELAY_DAYS|CLUSTERING_SENSITIVITY|LOCAL_PROFILES_PATH"
    r"|NEMO_\w+|EMAIL_\w+|TESTING|TEST_\w+|ENV_FILE)"
)


def _duration(value: Any) -> Any:
    """Accept ``90``, ``90s``, ``15m``, ``12h`` and ``7d``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", str(value))
    if not match:
        message = "must be a number of seconds, or a number with s, m, h or d (15m, 7d)"
        raise ValueError(message)
    return float(match[1]) * _UNITS[match[2] or "s"]


def _not_blank(value: str) -> str:
    if not value.strip():
        message = "must not be blank"
        raise ValueError(message)
    return value


Seconds = Annotated[float, BeforeValidator(_duration), Field(ge=0)]
Text = Annotated[str, AfterValidator(_not_blank)]
Strategy = Literal["all", "first_success", "best_effort"]


class Settings(BaseModel):
    """Settings of the service; field ``amqp_url`` is read from ``NX_AMQP_URL`` and so on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    amqp_url: SecretStr = Field(
        SecretStr("amqp://guest:guest@localhost:5672/"),
        description="address of RabbitMQ, with user and password",
    )
    amqp_exchange: Text = Field("nexuslims.records", description="topic exchange of built and exported records")
    database_url: SecretStr | None = Field(
        None, description="SQLite file or PostgreSQL; default: nexus-export.db in NX_DATA_PATH, else here"
    )
    instrument_data_path: Path | None = Field(
        None, description="raw data of the instruments; only named, never opened"
    )
    data_path: Path | None = Field(None, description="data folder of NexusLIMS; previews are relative to it")
    records_path: Path | None = Field(None, description="where record files lie; default: NX_DATA_PATH/records")
    spool_path: Path | None = Field(None, description="own copies of records; default: beside the database file")
    destinations_path: Path | None = Field(None, description="folder with further destination plugins")
    record_schema: Path | None = Field(None, description="XSD that records must satisfy; default: not checked")
    record_max_bytes: int = Field(50 * 1024**2, gt=0, description="largest record taken, in bytes")
    record_wait_seconds: Seconds = Field(600, description="how long a record file may be missing")
    export_strategy: Strategy = Field("all", description="all, first_success or best_effort")
    export_max_wait: Seconds = Field(7 * 86400, gt=0, description="end of every wait, in seconds or as 7d")
    retry_base_seconds: Seconds = Field(5, gt=0, description="upper bound of the first retry's wait")
    retry_max_seconds: Seconds = Field(3600, gt=0, description="upper bound of any retry's wait")
    lease_margin_seconds: Seconds = Field(
        30, gt=0, description="how much longer than its longest attempt a consumer holds a step; for PostgreSQL"
    )
    event_source: Text = Field("urn:nexus-export", description="CloudEvents source of what this service publishes")
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto: console at a terminal")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="lowest level written")
    log_path: Path | None = Field(None, description="folder that also gets nexus-export.log")

    @property
    def resolved_records_path(self) -> Path | None:
        """Return the records root, or None when neither setting names one."""
        return self.records_path or (self.data_path / "records" if self.data_path else None)

    @property
    def resolved_database_url(self) -> str:
        """Return the database address with an asynchronous driver."""
        if self.database_url is None:
            folder = self.data_path or Path.cwd()
            return f"sqlite+aiosqlite:///{folder.absolute() / 'nexus-export.db'}"
        url = self.database_url.get_secret_value()
        scheme, separator, rest = url.partition("://")
        drivers = {
            "sqlite": "sqlite+aiosqlite",
            "postgresql": "postgresql+asyncpg",
            "postgres": "postgresql+asyncpg",
        }
        return drivers.get(scheme, scheme) + separator + rest

    @property
    def resolved_spool_path(self) -> Path:
        """Return the folder of the service's own copies of records."""
        if self.spool_path:
            return self.spool_path
        url = self.resolved_database_url
        if url.startswith("sqlite"):
            return Path(url.partition(":///")[2]).absolute().parent / "nexus-export-spool"
        return (self.data_path or Path.cwd()) / "nexus-export-spool"


class LaneSettings(BaseModel):
    """What every destination has: ``NX_<NAME>_CONCURRENCY`` and so on; None: the destination's own default."""

    model_config = ConfigDict(frozen=True)

    concurrency: int | None = Field(None, ge=1, le=1000, description="attempts at once")
    min_interval_seconds: Seconds | None = Field(None, description="least time between two attempts")
    timeout_seconds: Seconds | None = Field(None, gt=0, description="longest attempt")
    settle_seconds: Seconds | None = Field(None, description="how long the server may commit after we gave up")
    max_attempts: int | None = Field(None, ge=1, description="attempts before a step fails")


@dataclass(frozen=True, slots=True)
class Value:
    """One setting as given: its text and where it was found."""

    text: str
    origin: str


@dataclass(frozen=True, slots=True)
class Environment:
    """All ``NX_`` values with their origins; a mapping from name to ``Value``."""

    values: Mapping[str, Value]

    def get(self, name: str) -> Value | None:
        """Return what was given for a name; an empty text counts as not given."""
        value = self.values.get(name)
        return value if value is not None and value.text.strip() else None

    def read(self, model: type[Model], prefix: str = "NX_") -> Model:
        """Build a settings model from the names it stands for.

        Raises ``ConfigurationError`` that lists every wrong value with its name and origin.
        """
        given = dict(self._given(model, prefix))
        try:
            return model.model_validate({field: value.text for field, value in given.items()}, by_name=True)
        except ValidationError as error:
            lines = [self._problem(model, prefix, given, item) for item in error.errors(include_url=False)]
            raise ConfigurationError("; ".join(lines)) from None

    def _given(self, model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Value]]:
        for field in model.model_fields:
            value = self.lookup(model, field, prefix)
            if value is not None:
                yield field, value

    def lookup(self, model: type[BaseModel], field: str, prefix: str) -> Value | None:
        """Return a field's value, reading ``NX_..._FILE`` for secrets."""
        name = variable(model, field, prefix)
        value = self.get(name)
        if value is not None or not is_secret(model, field):
            return value
        pointer = self.get(name + "_FILE")
        if pointer is None:
            return None
        try:
            text = Path(pointer.text).expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            message = f"{name}_FILE ({pointer.origin}): cannot read {pointer.text}: {error.strerror}"
            raise ConfigurationError(message) from None
        except ValueError:
            message = f"{name}_FILE ({pointer.origin}): {pointer.text} holds no UTF-8 text"
            raise ConfigurationError(message) from None
        return Value(text, f"file {pointer.text}")

    @staticmethod
    def _problem(model: type[BaseModel], prefix: str, given: Mapping[str, Value], item: Any) -> str:
        field = str(item["loc"][0]) if item["loc"] else ""
        if field not in model.model_fields:
            return str(item["msg"])
        name = variable(model, field, prefix)
        if field not in given:
            return f"{name} is not set"
        shown = "" if is_secret(model, field) else f" {given[field].text!r}"
        return f"{name}{shown} ({given[field].origin}): {item['msg'].removeprefix('Value error, ')}"


def variable(model: type[BaseModel], field: str, prefix: str) -> str:
    """Return the environment name of a field: its alias, else prefix and field in capitals."""
    alias = model.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else prefix + field.upper()


def is_secret(model: type[BaseModel], field: str) -> bool:
    """Tell whether a field's value must never be shown."""
    return "SecretStr" in str(model.model_fields[field].annotation)


def read_environment(environ: Mapping[str, str], folder: Path) -> Environment:
    """Collect every ``NX_`` value; the process environment comes before the files.

    Raises ``ConfigurationError`` when ``NX_ENV_FILE`` names a file that is not there.
    """
    values = {k: Value(v, "environment") for k, v in environ.items() if k.startswith("NX_")}
    files = [folder / ".env"]
    named = values.get("NX_ENV_FILE")
    if named and named.text.strip():
        path = folder / Path(named.text).expanduser()
        if not path.is_file():
            message = f"NX_ENV_FILE names {named.text}, which is no file"
            raise ConfigurationError(message)
        files.append(path)
    for file in files:
        for name, value in read_env_file(file).items():
            values.setdefault(name, value)
    return Environment(values)


def read_env_file(file: Path) -> dict[str, Value]:
    """Collect the ``NX_`` values of one file; a file that is not there holds none.

    Raises ``ConfigurationError`` when it cannot be read.
    """
    if not file.is_file():
        return {}
    try:
        found = dotenv_values(file, interpolate=False)
    except OSError as error:
        message = f"{file} cannot be read: {error.strerror}"
        raise ConfigurationError(message) from None
    except ValueError:
        message = f"{file} holds no UTF-8 text"
        raise ConfigurationError(message) from None
    return {k: Value(v, str(file)) for k, v in found.items() if k.startswith("NX_") and v is not None}
