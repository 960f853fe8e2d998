"""The first tables: jobs, steps, copies, lanes, outbox, upload_log, consumers, notices."""

from datetime import datetime

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def moment() -> sa.types.TypeEngine[datetime]:
    """timestamptz, or ISO 8601 text in UTC on SQLite."""
    return sa.DateTime(timezone=True).with_variant(sa.String(32), "sqlite")


def partial_index(name: str, table: str, columns: list[str], where: str) -> None:
    op.create_index(name, table, columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


def upgrade() -> None:
    jobs()
    steps()
    copies_and_lanes()
    outbox()
    upload_log()
    op.create_table(
        "consumers",
        sa.Column("owner", sa.String(100), primary_key=True),
        sa.Column("started_at", moment(), nullable=False),
        sa.Column("seen_at", moment(), nullable=False),
        sa.Column("broker_connected", sa.Boolean, nullable=False),
    )
    op.create_table(
        "notices",
        sa.Column("code", sa.String(64), primary_key=True),
        sa.Column("at", moment(), nullable=False),
    )


def jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("source", sa.String(1024), nullable=False),
        sa.Column("event_id", sa.String(512), nullable=False),
        sa.Column("data_sha256", sa.String(64), nullable=False),
        sa.Column("session", sa.String(255), nullable=False),
        sa.Column("build_time", moment(), nullable=False),
        sa.Column("received_at", moment(), nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("strategy", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("superseded_by", sa.String(36)),
        sa.Column("record_sha256", sa.String(64)),
        sa.Column("record_name", sa.String(255)),
        sa.Column("facts", sa.Text),
        sa.Column("snapshot_tries", sa.Integer, nullable=False, server_default="0"),
        sa.Column("snapshot_due_at", moment()),
        sa.Column("snapshot_since", moment(), nullable=False),
        sa.Column("decide_at", moment()),
        sa.Column("finished_at", moment()),
    )
    op.create_index("ix_jobs_session", "jobs", ["session"])
    for column in ("superseded_by", "snapshot_due_at", "decide_at"):
        partial_index(f"ix_jobs_{column}", "jobs", [column], f"{column} IS NOT NULL")


def steps() -> None:
    op.create_table(
        "steps",
        sa.Column("job_id", sa.String(36), primary_key=True),
        sa.Column("destination", sa.String(100), primary_key=True),
        sa.Column("session", sa.String(255), nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("purpose", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("lookups", sa.Integer, nullable=False, server_default="0"),
        sa.Column("due_since", moment()),
        sa.Column("next_attempt_at", moment()),
        sa.Column("first_attempt_at", moment()),
        sa.Column("last_request_at", moment()),
        sa.Column("error_code", sa.String(64)),
        sa.Column("reason", sa.Text),
        sa.Column("result", sa.Text),
        sqlite_with_rowid=False,
    )
    partial_index("ix_steps_waiting", "steps", ["destination", "next_attempt_at"], "next_attempt_at IS NOT NULL")
    partial_index("ix_steps_running", "steps", ["state"], "state = 'running'")


def copies_and_lanes() -> None:
    op.create_table(
        "copies",
        sa.Column("session", sa.String(255), primary_key=True),
        sa.Column("destination", sa.String(100), primary_key=True),
        sa.Column("record_id", sa.Text),
        sa.Column("record_url", sa.Text),
        sa.Column("sent_sha256", sa.String(64)),
        sa.Column("stored_sha256", sa.String(64)),
        sa.Column("build_time", moment()),
        sa.Column("links_sha256", sa.String(64)),
        sa.Column("remembered", sa.Text),
        sa.Column("recheck_at", moment()),
        sa.Column("unresolved_at", moment()),
        sa.Column("fence", sa.Integer, nullable=False, server_default="0"),
        sa.Column("holder", sa.String(36)),
        sa.Column("owner", sa.String(100)),
        sa.Column("lease_until", moment()),
        sqlite_with_rowid=False,
    )
    partial_index("ix_copies_recheck_at", "copies", ["recheck_at"], "recheck_at IS NOT NULL")
    op.create_table(
        "lanes",
        sa.Column("destination", sa.String(100), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("since", moment()),
        sa.Column("not_before", moment()),
        sa.Column("next_slot_at", moment()),
        sa.Column("probe_at", moment()),
        sa.Column("limit", sa.Integer),
    )


def outbox() -> None:
    op.create_table(
        "outbox",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("message_id", sa.String(128), nullable=False),
        sa.Column("job_id", sa.String(36)),
        sa.Column("exchange", sa.String(255), nullable=False),
        sa.Column("routing_key", sa.String(255), nullable=False),
        sa.Column("content_type", sa.String(100), nullable=False),
        sa.Column("headers", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("created_at", moment(), nullable=False),
        sa.Column("sent_at", moment()),
        sa.Column("unrouted", sa.Boolean, nullable=False, server_default=sa.text("false")),
        sa.UniqueConstraint("kind", "message_id", name="uq_outbox_kind_message_id"),
        sqlite_autoincrement=True,
    )
    partial_index("ix_outbox_unsent", "outbox", ["seq"], "sent_at IS NULL")


def upload_log() -> None:
    op.create_table(
        "upload_log",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("session_identifier", sa.String(255), nullable=False),
        sa.Column("destination_name", sa.String(100), nullable=False),
        sa.Column("success", sa.Boolean, nullable=False),
        sa.Column("timestamp", moment(), nullable=False),
        sa.Column("record_id", sa.Text),
        sa.Column("record_url", sa.Text),
        sa.Column("error_message", sa.Text),
        sa.Column("metadata_json", sa.Text),
        sa.Column("event_id", sa.String(512)),
        sa.Column("source", sa.String(1024)),
        sa.Column("attempt", sa.Integer),
        sa.Column("error_code", sa.String(64)),
        sa.Column("duration_s", sa.Float),
        sa.Column("purpose", sa.String(16)),
    )
    op.create_index("ix_upload_log_session_identifier", "upload_log", ["session_identifier"])
    op.create_index("ix_upload_log_destination_name", "upload_log", ["destination_name"])
    op.execute(
        "CREATE VIEW upload_log_latest AS SELECT * FROM upload_log WHERE id IN "
        "(SELECT max(id) FROM upload_log GROUP BY session_identifier, destination_name)"
    )
