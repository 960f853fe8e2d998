"""The migrations lead to the tables that the code uses, from any start, also when several begin at once."""

import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, insert, inspect, text

from consumer.store import schema
from consumer.store.connection import Database
from consumer.store.tables import metadata, upload_log
from tools.servers.process import clean_environment

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """Give an empty database."""
    async with Database(database_url) as found:
        yield found


async def do(database: Database, statement: str) -> list[Any]:
    """Execute a statement; returns its rows."""
    async with database.write() as connection:
        result = await connection.execute(text(statement))
        return list(result) if result.returns_rows else []


def differences(connection: Connection) -> list[Any]:
    """Return what alembic would change to bring the tables to the metadata."""
    context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
    return [item for item in compare_metadata(context, metadata) if "alembic_version" not in str(item)]


def unnamed(connection: Connection) -> dict[str, list[str]]:
    """Return what alembic does not compare: primary keys and their columns, and the conditions of indices."""
    found = {}
    for table in inspect(connection).get_table_names():
        keys = inspect(connection).get_pk_constraint(table)["constrained_columns"]
        indices = inspect(connection).get_indexes(table)
        wheres = {item["name"]: item["dialect_options"] for item in indices if item.get("dialect_options")}
        partial = {
            f"{name}: {sorted(options)}" for name, options in wheres.items() if any("where" in o for o in options)
        }
        found[table] = [*keys, *sorted(partial)]
    found.pop("alembic_version", None)
    return found


async def test_the_migrations_from_zero_equal_the_metadata(database: Database, tmp_path: Path) -> None:
    assert await schema.current(database) is None
    assert await schema.upgrade(database) == (None, schema.head())
    async with database.read() as connection:
        assert await connection.run_sync(differences) == []
        migrated = await connection.run_sync(unnamed)
    if not database.is_sqlite:
        await do(database, "DROP SCHEMA public CASCADE")
        await do(database, "CREATE SCHEMA public")
        await create_and_compare(database, migrated)
        return
    async with Database(f"sqlite+aiosqlite:///{tmp_path}/metadata.db") as other:
        await create_and_compare(other, migrated)


async def create_and_compare(database: Database, migrated: dict[str, list[str]]) -> None:
    """Create the tables straight from the metadata; they must have the same keys and partial indices."""
    async with database.write() as connection:
        await connection.run_sync(metadata.create_all)
        assert await connection.run_sync(unnamed) == migrated
    assert any("where" in line for lines in migrated.values() for line in lines)


async def test_the_view_shows_the_latest_row_of_each_session_and_destination(database: Database) -> None:
    await schema.upgrade(database)
    rows = [("a", "cdcs", False), ("a", "cdcs", True), ("a", "archive", True), ("b", "cdcs", False)]
    async with database.write() as connection:
        for session, destination, success in rows:
            await connection.execute(
                insert(upload_log).values(
                    session_identifier=session, destination_name=destination, success=success,
                    timestamp=datetime.now(UTC),
                )
            )  # fmt: skip
    found = await do(
        database,
        "SELECT session_identifier, destination_name, success FROM upload_log_latest"
        " ORDER BY session_identifier, destination_name",
    )
    assert [(row[0], row[1], bool(row[2])) for row in found] == [
        ("a", "archive", True),
        ("a", "cdcs", True),
        ("b", "cdcs", False),
    ]
    columns = {column.name for column in upload_log.columns}
    async with database.read() as connection:
        result = await connection.execute(text("SELECT * FROM upload_log_latest"))
        assert set(result.keys()) == columns


def test_there_is_one_head() -> None:
    assert len(ScriptDirectory(str(PROJECT / "migrations")).get_heads()) == 1


async def test_an_upgrade_that_is_repeated_changes_nothing(database: Database) -> None:
    await schema.upgrade(database)
    await do(database, "INSERT INTO lanes (destination, state) VALUES ('kept', 'active')")
    assert await schema.upgrade(database) == (schema.head(), schema.head())
    assert len(await do(database, "SELECT * FROM lanes")) == 1
    assert len(await do(database, "SELECT * FROM alembic_version")) == 1


async def test_a_database_of_a_newer_release_is_refused_and_stays_as_it_is(database: Database) -> None:
    await schema.upgrade(database)
    await do(database, "UPDATE alembic_version SET version_num = 'from-the-future'")
    with pytest.raises(schema.SchemaTooNewError, match="from-the-future"):
        await schema.upgrade(database)
    assert await schema.current(database) == "from-the-future"


async def test_an_upgrade_that_fails_leaves_nothing_behind(database: Database) -> None:
    # something in the way of the last table
    await do(database, "CREATE TABLE upload_log (x integer)")
    with pytest.raises(Exception, match="upload_log"):
        await schema.upgrade(database)
    async with database.read() as connection:
        assert await connection.run_sync(lambda c: inspect(c).get_table_names()) == ["upload_log"]


def test_upgrades_at_once_do_not_disturb_each_other(database_url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "consumer", "db", "upgrade"]
    env = clean_environment(NX_DATABASE_URL=database_url, PYTHONPATH=str(PROJECT))
    running = [
        subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(4)
    ]
    said = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    head = schema.head()
    assert sorted(line.strip() for line in said) == [*["up to date"] * 3, f"upgraded from empty to {head}"]
