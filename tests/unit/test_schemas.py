"""The schemas in the documentation are what the models say, and what the models say is what is sent."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from consumer.broker import DEAD_QUEUE, WORK_QUEUE
from consumer.commands.schemas import DATA, documents, write_schemas
from consumer.events import Activity, DestinationResult, Envelope, Outcome, RecordBuilt, Reservation
from consumer.pipeline.outcome import Names, messages_of
from consumer.store.rows import JobState, StepState
from tests.unit.builders import NOW, document, job_row, step_row

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
SCHEMAS = {name: json.loads(text) for name, text in documents().items() if name.endswith(".schema.json")}


@pytest.mark.parametrize("name", documents())
def test_the_documentation_is_up_to_date(name: str) -> None:
    assert (REFERENCE / name).read_text(encoding="utf-8") == documents()[name], "run: make docs-reference"


def test_the_documentation_holds_nothing_else() -> None:
    assert {path.name for path in REFERENCE.glob("*.json")} == set(documents())


def test_schema_writes_all_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_schemas(tmp_path / "new" / "folder") == 0
    written = {path.name: path.read_text() for path in (tmp_path / "new" / "folder").iterdir()}
    assert written == documents()
    capsys.readouterr()
    assert write_schemas(None) == 0
    assert capsys.readouterr().out == "".join(documents().values())


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_reference_of_a_schema_leads_somewhere(name: str) -> None:
    schema = SCHEMAS[name]
    found = set(references(schema))
    assert found
    assert found == {f"#/$defs/{definition}" for definition in schema["$defs"]}


def test_every_reference_of_the_asyncapi_document_leads_somewhere() -> None:
    whole = json.loads(documents()["asyncapi.json"])
    for reference in references(whole):
        if not reference.startswith("#/"):
            assert reference in SCHEMAS
            continue
        value = whole
        for part in reference[2:].split("/"):
            value = value[part]
        assert value
    assert set(whole["channels"]) == set(DATA)
    assert {name: one["action"] for name, one in whole["operations"].items()} == {
        "takeBuilt": "receive",
        "tellExported": "send",
        "tellExportFailed": "send",
    }
    assert WORK_QUEUE in whole["info"]["description"]
    assert DEAD_QUEUE in whole["info"]["description"]


def test_identifiers_are_the_dataschema_of_the_events() -> None:
    assert {schema["$id"] for schema in SCHEMAS.values()} == {f"urn:nexus-export:schema:{kind}:1" for kind in DATA}


def properties(schema: dict[str, Any], definition: str) -> set[str]:
    return set(schema["$defs"][definition]["properties"])


def test_a_schema_names_every_field_of_its_models() -> None:
    built, outcome = SCHEMAS["record.built.schema.json"], SCHEMAS["record.exported.schema.json"]
    pairs: list[tuple[set[str], type[BaseModel]]] = [
        (set(built["properties"]) - {"data"}, Envelope),
        (set(built["properties"]["data"]["properties"]), RecordBuilt),
        (properties(built, "Activity"), Activity),
        (properties(built, "Reservation"), Reservation),
        (set(outcome["properties"]["data"]["properties"]), Outcome),
        (properties(outcome, "DestinationResult"), DestinationResult),
    ]
    for found, model in pairs:
        assert found == set(model.model_fields), model
    assert set(built["properties"]["data"]["required"]) == {"session_identifier", "record"}
    assert built["required"] == ["specversion", "id", "source", "type", "data"]


def test_a_schema_knows_the_bounds_that_the_reader_has() -> None:
    built = SCHEMAS["record.built.schema.json"]
    session = built["properties"]["data"]["properties"]["session_identifier"]
    assert (session["minLength"], session["maxLength"]) == (1, 255)
    assert built["$defs"]["RecordByPath"]["properties"]["size"] == {
        "minimum": 0, "title": "Size", "type": "integer",
    }  # fmt: skip
    assert set(built["$defs"]["RecordInline"]["required"]) == {"name", "content", "sha256", "size"}
    results = SCHEMAS["record.exported.schema.json"]["$defs"]["DestinationResult"]["properties"]
    assert results["action"]["enum"] == ["created", "updated", "unchanged", "linked", "none"]
    assert results["next_action"]["enum"] == ["none", "replay", "fix_config", "fix_record"]


@pytest.mark.parametrize("state", [JobState.EXPORTED, JobState.FAILED])
def test_a_real_outcome_is_what_the_schema_says(state: JobState) -> None:
    job = job_row(state=state)
    steps = [step_row("cdcs", StepState.DONE, job), step_row("elabftw", StepState.FAILED, job)]
    message = messages_of(job, steps, NOW, Names("x", "y", "urn:me"))[0]
    event = json.loads(message.body)
    schema = SCHEMAS[f"{message.routing_key}.schema.json"]
    assert event["type"] == schema["properties"]["type"]["const"]
    assert event["dataschema"] == schema["$id"]
    assert set(event) - {"datacontenttype"} <= set(schema["properties"])
    assert set(schema["required"]) <= set(event)
    data = schema["properties"]["data"]
    assert set(data["required"]) <= set(event["data"]) == set(data["properties"])
    for one in event["data"]["results"]:
        assert set(one) == properties(schema, "DestinationResult")
    Envelope.model_validate(event)
    Outcome.model_validate(event["data"], strict=False)


def test_an_event_of_the_tests_is_what_the_schema_says() -> None:
    schema = SCHEMAS["record.built.schema.json"]
    assert set(document()) <= set(schema["properties"])
    assert set(document()["data"]) <= set(schema["properties"]["data"]["properties"])
