"""The tables; ``migrations/`` holds the same as steps, and a test compares the two."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    DateTime,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeEngine

metadata = MetaData(naming_convention={"ix": "ix_%(table_name)s_%(column_0_N_name)s", "pk": "pk_%(table_name)s"})


class Utc(TypeDecorator[datetime]):
    """Zone-aware moments: timestamptz on PostgreSQL, sortable ISO 8601 text in UTC on SQLite.

    The text is read and written by C code; SQLAlchemy's own text format cost a tenth of the time of a record.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Choose the column type."""
        if dialect.name == "sqlite":
            return dialect.type_descriptor(String(32))
        return dialect.type_descriptor(DateTime(timezone=True))

    def bind_processor(self, dialect: Dialect) -> Any:
        """Return the function that turns a moment into what the driver takes; it refuses naive ones."""
        as_text = dialect.name == "sqlite"

        last: datetime | None = None  # all rows of a batch carry the very same moments
        made: datetime | str | None = None

        def process(value: datetime | None) -> datetime | str | None:
            nonlocal last, made
            if value is last:
                return made
            if value is None:
                return None
            if value.tzinfo is None:
                message = f"naive time {value}: the store takes only times with a zone"
                raise ValueError(message)
            moment = value.astimezone(UTC)
            last, made = value, moment.isoformat(timespec="microseconds") if as_text else moment
            return made

        return process

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:  # noqa: ARG002 - SQLAlchemy's signature
        """Return the function that turns what the driver gives into a moment."""
        if dialect.name != "sqlite":
            return None
        return lambda text: None if text is None else datetime.fromisoformat(text)


jobs = Table(
    "jobs",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("source", String(1024), nullable=False),
    Column("event_id", String(512), nullable=False),
    Column("data_sha256", String(64), nullable=False),
    Column("session", String(255), nullable=False),
    Column("build_time", Utc, nullable=False),
    Column("received_at", Utc, nullable=False),
    Column("event", Text, nullable=False),
    Column("strategy", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("superseded_by", String(36)),
    Column("record_sha256", String(64)),
    Column("record_name", String(255)),
    Column("facts", Text),
    Column("snapshot_tries", Integer, nullable=False, server_default="0"),
    Column("snapshot_due_at", Utc),
    Column("snapshot_since", Utc, nullable=False),
    Column("decide_at", Utc),
    Column("finished_at", Utc),
    Index("ix_jobs_session", "session"),
    Index("ix_jobs_superseded_by", "superseded_by", postgresql_where=text("superseded_by IS NOT NULL"),
          sqlite_where=text("superseded_by IS NOT NULL")),
    Index("ix_jobs_snapshot_due_at", "snapshot_due_at", postgresql_where=text("snapshot_due_at IS NOT NULL"),
          sqlite_where=text("snapshot_due_at IS NOT NULL")),
    Index("ix_jobs_decide_at", "decide_at", postgresql_where=text("decide_at IS NOT NULL"),
          sqlite_where=text("decide_at IS NOT NULL")),
)  # fmt: skip

steps = Table(
    "steps",
    metadata,
    Column("job_id", String(36), primary_key=True),
    Column("destination", String(100), primary_key=True),
    Column("session", String(255), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("lookups", Integer, nullable=False, server_default="0"),
    Column("due_since", Utc),
    Column("next_attempt_at", Utc),
    Column("first_attempt_at", Utc),
    Column("last_request_at", Utc),
    Column("error_code", String(64)),
    Column("reason", Text),
    Column("result", Text),
    # Only waiting steps are in the first and running ones in the second, so claiming stays quick beside a million
    # finished ones. SQLite uses a partial index only where the query states its condition.
    Index("ix_steps_waiting", "destination", "next_attempt_at",
          postgresql_where=text("next_attempt_at IS NOT NULL"), sqlite_where=text("next_attempt_at IS NOT NULL")),
    Index("ix_steps_running", "state",
          postgresql_where=text("state = 'running'"), sqlite_where=text("state = 'running'")),
    sqlite_with_rowid=False,  # the key is the row: one tree to keep instead of two
)  # fmt: skip

copies = Table(
    "copies",
    metadata,
    Column("session", String(255), primary_key=True),
    Column("destination", String(100), primary_key=True),
    Column("record_id", Text),
    Column("record_url", Text),
    Column("sent_sha256", String(64)),
    Column("stored_sha256", String(64)),
    Column("build_time", Utc),
    Column("links_sha256", String(64)),
    Column("remembered", Text),
    Column("recheck_at", Utc),
    Column("unresolved_at", Utc),
    Column("fence", Integer, nullable=False, server_default="0"),
    Column("holder", String(36)),
    Column("owner", String(100)),
    Column("lease_until", Utc),
    Index("ix_copies_recheck_at", "recheck_at", postgresql_where=text("recheck_at IS NOT NULL"),
          sqlite_where=text("recheck_at IS NOT NULL")),
    sqlite_with_rowid=False,
)  # fmt: skip

lanes = Table(
    "lanes",
    metadata,
    Column("destination", String(100), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("reason", Text),
    Column("since", Utc),
    Column("not_before", Utc),
    Column("next_slot_at", Utc),
    Column("probe_at", Utc),
    Column("limit", Integer),
)

outbox = Table(
    "outbox",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("kind", String(32), nullable=False),
    Column("message_id", String(128), nullable=False),
    Column("job_id", String(36)),
    Column("exchange", String(255), nullable=False),
    Column("routing_key", String(255), nullable=False),
    Column("content_type", String(100), nullable=False),
    Column("headers", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("created_at", Utc, nullable=False),
    Column("sent_at", Utc),
    Column("unrouted", Boolean, nullable=False, server_default=text("false")),
    UniqueConstraint("kind", "message_id", name="uq_outbox_kind_message_id"),
    Index("ix_outbox_unsent", "seq", postgresql_where=text("sent_at IS NULL"),
          sqlite_where=text("sent_at IS NULL")),
    sqlite_autoincrement=True,
)  # fmt: skip

upload_log = Table(
    "upload_log",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("session_identifier", String(255), nullable=False),
    Column("destination_name", String(100), nullable=False),
    Column("success", Boolean, nullable=False),
    Column("timestamp", Utc, nullable=False),
    Column("record_id", Text),
    Column("record_url", Text),
    Column("error_message", Text),
    Column("metadata_json", Text),
    Column("event_id", String(512)),
    Column("source", String(1024)),
    Column("attempt", Integer),
    Column("error_code", String(64)),
    Column("duration_s", Float),
    Column("purpose", String(16)),
    Index("ix_upload_log_session_identifier", "session_identifier"),
    Index("ix_upload_log_destination_name", "destination_name"),
)

notices = Table(
    "notices",
    metadata,
    Column("code", String(64), primary_key=True),
    Column("at", Utc, nullable=False),
)

consumers = Table(
    "consumers",
    metadata,
    Column("owner", String(100), primary_key=True),
    Column("started_at", Utc, nullable=False),
    Column("seen_at", Utc, nullable=False),
    Column("broker_connected", Boolean, nullable=False),
)
