"""The command line, and the place where everything is put together; the only reader of settings."""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from consumer.broker import Broker, BrokerAwayError
from consumer.clients.publish import PublishOptions, UnusableFileError
from consumer.commands import (
    conformance,
    console,
    destinations,
    doctor,
    export,
    new_destination,
    publish,
    republish,
    schemas,
    settings,
    status,
)
from consumer.config import Environment, Settings, read_environment
from consumer.destinations.registry import Registry, load_registry
from consumer.errors import ConfigurationError
from consumer.pipeline.service import build_pipeline, serve
from consumer.store import schema
from consumer.store.connection import Database, DatabaseError, DatabaseLockedError
from consumer.telemetry import configure_logging, get_logger
from consumer.testing.conformance_subject import Options

FAILED, USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="nexus-export",
    help="Exports microscopy records: record.built in, CDCS and a local archive out, the outcome back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="Settings.", no_args_is_help=True)
db_app = typer.Typer(help="The database.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(db_app, name="db")

Json = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
_log = get_logger()


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything that settings decide."""

    environment: Environment
    settings: Settings
    registry: Registry


def read_setup() -> Setup:
    """Read all settings and load the destinations. Raises ``ConfigurationError``."""
    environment = read_environment(os.environ, Path.cwd())
    found = environment.read(Settings)
    return Setup(environment, found, load_registry(environment, found.destinations_path))


def _logging(found: Settings, *, quiet: bool = False) -> None:
    level = "WARNING" if quiet and found.log_level == "INFO" else found.log_level
    configure_logging(level=level, style=found.log_format, folder=None if quiet else found.log_path, quiet=quiet)


def _run(work: Callable[[Setup], Awaitable[int]], *, quiet: bool = True) -> None:
    """Run a command to its exit code; what a person can mend ends in one sentence."""
    try:
        setup = read_setup()
        _logging(setup.settings, quiet=quiet)
        code = asyncio.run(_unwrapped(work(setup)))
    except (ConfigurationError, DatabaseLockedError, schema.SchemaTooNewError) as error:
        console.complain(f"{error}. See: nexus-export config show")
        raise typer.Exit(USAGE) from None
    except (BrokerAwayError, UnusableFileError) as error:
        console.complain(f"{error}. See: nexus-export doctor")
        raise typer.Exit(FAILED) from None
    except DatabaseError as error:
        console.complain(f"the database does not answer: {str(error).splitlines()[0]}. See: nexus-export doctor")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if quiet:
        raise typer.Exit(code)
    _end(code)


async def _unwrapped(work: Awaitable[int]) -> int:
    """Let the first error out of its group, so that it is told like any other."""
    try:
        return await work
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


def _end(code: int) -> None:
    """Leave; a plugin's thread that never ends must not keep the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _open(stack: AsyncExitStack, setup: Setup, *, engine: bool) -> Database:
    database = await stack.enter_async_context(Database(setup.settings.resolved_database_url))
    if engine:
        if database.is_sqlite:
            database.path.parent.mkdir(parents=True, exist_ok=True)
        database.lock_for_engine()
        before, after = await schema.upgrade(database)
        if before != after:
            _log.info("database_upgraded", before=before, after=after)
    return database


# --- the service -----------------------------------------------------------------------------------------------


@app.command()
def run() -> None:
    """Run the consumer until SIGTERM or Ctrl-C."""
    _run(_serve, quiet=False)


async def _serve(setup: Setup) -> int:
    if not setup.registry.enabled:
        reasons = "; ".join(f"{item.name}: {item.disabled_because}" for item in setup.registry.known.values())
        message = f"no destination is enabled, so records would go nowhere ({reasons})"
        raise ConfigurationError(message)
    for problem in setup.registry.problems:
        _log.error("plugin_not_used", origin=problem.origin, reason=problem.message)
    for name, near in settings.unknown_names(setup.environment, setup.registry).items():
        _log.warning("setting_unknown", name=name, did_you_mean=near)
    _collect_less_often()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        database = await _open(stack, setup, engine=True)
        pipeline = build_pipeline(setup.settings, database, setup.registry)
        broker = Broker(setup.settings.amqp_url.get_secret_value(), setup.settings.amqp_exchange)
        _log.info("starting", destinations=list(setup.registry.enabled), strategy=setup.settings.export_strategy)
        await serve(pipeline, broker, stop)
    return 0


def _collect_less_often() -> None:
    """Spare the garbage collector what lives as long as the process, and let short-lived rows die by themselves.

    With the defaults it took a sixth of the time of each record.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@app.command("export")
def export_command(
    file: Annotated[Path, typer.Argument(help="record file (XML)")],
    session: Annotated[str | None, typer.Option(help="session identifier; default: from the record")] = None,
    as_json: Json = False,
) -> None:
    """Export one record through the same engine, with no broker."""

    async def work(setup: Setup) -> int:
        async with AsyncExitStack() as stack:
            database = await _open(stack, setup, engine=True)
            pipeline = build_pipeline(setup.settings, database, setup.registry)
            options = PublishOptions(setup.settings.resolved_records_path, setup.settings.event_source, session)
            return await export.export_file(pipeline, file, options, as_json=as_json)

    _run(work)


# --- for people ------------------------------------------------------------------------------------------------


@app.command("publish")
def publish_command(  # noqa: PLR0917 - typer gives arguments by name
    files: Annotated[list[Path], typer.Argument(help="record files (XML)")],
    session: Annotated[str | None, typer.Option(help="session identifier; default: from the record")] = None,
    destination: Annotated[list[str] | None, typer.Option(help="only there; may be repeated")] = None,
    strategy: Annotated[str | None, typer.Option(help="all, first_success or best_effort")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="show each outcome as it comes")] = False,
    timeout: Annotated[float, typer.Option(help="longest wait in seconds")] = 300.0,
    as_json: Json = False,
) -> None:
    """Publish record.built for record files."""
    if session is not None and len(files) > 1:
        console.complain("--session names one session: publish its file alone")
        raise typer.Exit(USAGE)

    async def work(setup: Setup) -> int:
        options = PublishOptions(
            setup.settings.resolved_records_path,
            setup.settings.event_source,
            session,
            tuple(destination) if destination else None,
            strategy,
        )
        seconds = timeout if wait else None
        return await publish.publish(setup.settings, files, options, wait_seconds=seconds, as_json=as_json)

    _run(work)


@app.command("status")
def status_command(as_json: Json = False) -> None:
    """Show what waits, what failed and why; exit code 1 when something needs you."""

    async def work(setup: Setup) -> int:
        async with AsyncExitStack() as stack:
            database = await _open(stack, setup, engine=False)
            return await status.show_status(setup.settings, database, setup.registry, as_json=as_json)

    _run(work)


@app.command("republish")
def republish_command(  # noqa: PLR0917 - typer gives arguments by name
    since: Annotated[str | None, typer.Option(help="written from then on: a time, a date (UTC), or 2h, 3d")] = None,
    until: Annotated[str | None, typer.Option(help="written before then; a date counts as a whole day")] = None,
    session: Annotated[list[str] | None, typer.Option(help="only of this session; may be repeated")] = None,
    unrouted: Annotated[bool, typer.Option("--unrouted", help="only those that no queue took")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say how many, send nothing")] = False,
    as_json: Json = False,
) -> None:
    """Send outcomes once more, byte for byte: of each record the newest one."""
    try:
        chosen = republish.choose(since, until, session or (), unrouted=unrouted)
    except ValueError as error:
        console.complain(str(error))
        raise typer.Exit(USAGE) from None

    async def work(setup: Setup) -> int:
        async with AsyncExitStack() as stack:
            database = await _open(stack, setup, engine=False)
            return await republish.republish(database, chosen, dry_run=dry_run, as_json=as_json)

    _run(work)


@app.command("destinations")
def destinations_command(as_json: Json = False) -> None:
    """Show every destination: order, enabled, checked, and why not."""

    async def work(setup: Setup) -> int:
        return await destinations.show_destinations(setup.registry, as_json=as_json)

    _run(work)


@app.command("doctor")
def doctor_command(as_json: Json = False) -> None:
    """Look at broker, database, folders and destinations; say what is wrong and what to do."""

    async def work(setup: Setup) -> int:
        async with AsyncExitStack() as stack:
            database = await _open(stack, setup, engine=False)
            found = setup.settings, setup.environment, database, setup.registry
            return await doctor.run_doctor(*found, as_json=as_json)

    _run(work)


# --- for authors of plugins --------------------------------------------------------------------------------------


@app.command("new-destination")
def new_destination_command(
    name: Annotated[str, typer.Argument(help="lower-case letters, digits and _")],
    folder: Annotated[Path, typer.Option(help="where to write it")] = Path(),
) -> None:
    """Write a small destination that works, a server to try it with, and its test."""
    try:
        code = new_destination.write_destination(name, folder)
    except ValueError as error:
        console.complain(str(error))
        raise typer.Exit(USAGE) from None
    raise typer.Exit(code)


@app.command("conformance")
def conformance_command(  # noqa: PLR0917 - typer gives arguments by name
    spec: Annotated[str, typer.Argument(help="MODULE:CLASS, FILE.py:CLASS, or the name of an installed one")],
    server: Annotated[str | None, typer.Option(help="command that serves on 127.0.0.1:{port}")] = None,
    url: Annotated[str | None, typer.Option(help="address of the server; default: the setting's")] = None,
    url_setting: Annotated[str | None, typer.Option(help="its setting; default: NX_<NAME>_URL")] = None,
    count_command: Annotated[
        str | None, typer.Option(help="prints the copies of {session} {title} {key} {sha256} on {port}")
    ] = None,
    count_url: Annotated[str | None, typer.Option(help="address that answers the same")] = None,
    reads: Annotated[list[str] | None, typer.Option(help="pattern of requests that only read")] = None,
    creates: Annotated[list[str] | None, typer.Option(help="pattern of GETs that change something")] = None,
    fault: Annotated[list[str] | None, typer.Option(help="only this fault; may be repeated")] = None,
    record: Annotated[
        Path | None, typer.Option(help="record file to send; default: a small one", exists=True, dir_okay=False)
    ] = None,
    path_setting: Annotated[
        str | None, typer.Option(help="setting of a folder: disk faults, for a destination of files")
    ] = None,
    limit: Annotated[float, typer.Option(help="longest attempt that a fault stalls, in seconds")] = 3.0,
    settle: Annotated[float, typer.Option(help="settle time H in seconds")] = 1.0,
    parallel: Annotated[int, typer.Option(help="cases at once")] = 16,
    as_json: Json = False,
) -> None:
    """Prove a destination: forty wire faults between it and a server for tests, what must be true after each."""

    async def work(setup: Setup) -> int:
        content = record.read_bytes() if record else None
        options = Options(
            limit, settle, parallel, tuple(reads or ()), tuple(creates or ()), content, only=tuple(fault or ())
        )
        plugins = setup.settings.destinations_path
        wish = conformance.Wish(
            spec, url_setting, server, url, count_command, count_url, plugins, path_setting=path_setting
        )
        return await conformance.run_conformance(wish, options, setup.environment, as_json=as_json)

    _run(work)


@app.command()
def init(
    source: Annotated[Path | None, typer.Option("--from", help="the .env of NexusLIMS to take values from")] = None,
) -> None:
    """Write a commented .env here, taking over what NexusLIMS has set."""
    try:
        registry = load_registry(Environment({}))
        code = settings.write_env(Path.cwd(), source, registry)
    except ConfigurationError as error:
        console.complain(str(error))
        raise typer.Exit(USAGE) from None
    raise typer.Exit(code)


@app.command("schema")
def schema_command(
    write: Annotated[Path | None, typer.Option(help="folder to write the documents into")] = None,
) -> None:
    """Print the JSON Schemas of all events and the AsyncAPI document."""
    raise typer.Exit(schemas.write_schemas(write))


@config_app.command("show")
def config_show(as_json: Json = False) -> None:
    """Show every setting: value, origin and meaning; secrets stay hidden."""

    async def work(setup: Setup) -> int:
        return settings.show_config(setup.environment, setup.registry, as_json=as_json)

    _run(work)


@db_app.command("upgrade")
def db_upgrade() -> None:
    """Bring the tables up to date."""

    async def work(setup: Setup) -> int:
        async with AsyncExitStack() as stack:
            database = await _open(stack, setup, engine=False)
            before, after = await schema.upgrade(database)
            console.say("up to date" if before == after else f"upgraded from {before or 'empty'} to {after}")
        return 0

    _run(work)


def cli() -> None:
    """Enter the program; anything unforeseen ends with exit code 1 and its trace in the log."""
    try:
        app()
    except Exception:  # noqa: BLE001 - the top of the program: a trace in the log instead of a bare crash
        configure_logging(level="INFO", style="auto")
        _log.exception("crashed")
        sys.exit(FAILED)
