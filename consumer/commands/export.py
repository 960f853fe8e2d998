"""``export``: one record through the same stages, with no broker."""

from pathlib import Path

from pydantic_core import from_json

from consumer.clients.publish import PublishOptions, build_event
from consumer.commands import console
from consumer.commands.publish import show_outcome
from consumer.events import STRUCTURED_TYPE, outcome_body, restore_built
from consumer.pipeline.intake import arrive
from consumer.pipeline.outcome import outcome_of
from consumer.pipeline.service import Pipeline, export_one
from consumer.store.rows import JobState


async def export_file(pipeline: Pipeline, path: Path, options: PublishOptions, *, as_json: bool) -> int:
    """Export a record file and print its outcome; returns 1 when it did not arrive everywhere it should."""
    built = build_event(path, options)
    arrived = arrive(built.body, STRUCTURED_TYPE, {}, redelivered=False)
    _accepted, job, steps = await export_one(pipeline, arrived)
    outcome = outcome_of(job, restore_built(job.event), steps, job)
    body = outcome_body(outcome, event_id="", source="", time=job.received_at, traceparent=None)
    data = from_json(body)["data"]
    if as_json:
        console.print_json(data)
    else:
        show_outcome(data)
    return 0 if job.state is JobState.EXPORTED else 1
