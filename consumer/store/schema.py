"""The version of the tables: what it is, and how to bring it up to date."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from consumer.errors import NexusExportError
from consumer.store.connection import Database

_ADVISORY_LOCK = 0x6E786578  # one number that all consumers of one PostgreSQL agree on


class SchemaTooNewError(NexusExportError):
    """The database was written by a newer release."""


def _folder() -> Path:
    """Find the migrations: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


def head() -> str:
    """Return the newest revision that this release knows."""
    return str(ScriptDirectory(str(_folder())).get_current_head())


async def current(database: Database) -> str | None:
    """Return the revision of a database, or None when it is empty."""
    if database.is_sqlite and not database.path.exists():
        return None  # asking would create the file
    async with database.read() as connection:
        return await connection.run_sync(_current)


async def upgrade(database: Database) -> tuple[str | None, str]:
    """Bring the tables up to date; several processes may call it at once. Returns the old and new revision.

    Raises ``SchemaTooNewError`` when the database knows revisions that this release does not.
    """
    async with database.write() as connection:
        if not database.is_sqlite:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        before = await connection.run_sync(_current)
        newest = head()
        if before != newest:
            known = {script.revision for script in ScriptDirectory(str(_folder())).walk_revisions()}
            if before is not None and before not in known:
                message = f"the database is at revision {before}, which a newer release wrote; update nexus-export"
                raise SchemaTooNewError(message)
            await connection.run_sync(_upgrade)
    return before, newest


def _current(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    value: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return value


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(_folder()))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
