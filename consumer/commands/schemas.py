"""``schema``: the JSON Schemas of all events and the AsyncAPI document, made from the models."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from consumer.broker import DEAD_QUEUE, WORK_QUEUE
from consumer.commands import console
from consumer.events import (
    BUILT,
    EXPORT_FAILED,
    EXPORTED,
    SCHEMA_BASE,
    STRUCTURED_TYPE,
    Envelope,
    Outcome,
    RecordBuilt,
)

DATA: dict[str, type[BaseModel]] = {BUILT: RecordBuilt, EXPORTED: Outcome, EXPORT_FAILED: Outcome}


def event_schema(kind: str) -> dict[str, Any]:
    """Return the JSON Schema of a whole structured event."""
    mode: Any = "validation" if kind == BUILT else "serialization"
    data = DATA[kind].model_json_schema(mode=mode)
    definitions = data.pop("$defs", {})
    envelope = Envelope.model_json_schema()
    properties = {**envelope["properties"], "type": {"const": kind}, "data": data}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{SCHEMA_BASE}{kind}:1",
        "title": kind,
        "type": "object",
        "required": ["specversion", "id", "source", "type", "data"],
        "properties": properties,
        "$defs": definitions,
    }


def asyncapi() -> dict[str, Any]:
    """Return the AsyncAPI 3 document: what is received from where, and what is sent."""
    channels = {
        kind: {"address": kind, "messages": {kind: {"$ref": f"#/components/messages/{kind}"}},
               "bindings": {"amqp": {"is": "routingKey", "bindingVersion": "0.3.0",
                                     "exchange": {"name": "nexuslims.records", "type": "topic", "durable": True}}}}
        for kind in DATA
    }  # fmt: skip
    messages = {
        kind: {"name": kind, "contentType": STRUCTURED_TYPE, "payload": {"$ref": f"{kind}.schema.json"}}
        for kind in DATA
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "nexus-export",
            "version": "1",
            "description": f"Takes {BUILT} from the queue {WORK_QUEUE}; dead letters are in {DEAD_QUEUE}.",
        },
        "channels": channels,
        "operations": {
            "takeBuilt": {"action": "receive", "channel": {"$ref": f"#/channels/{BUILT}"}},
            "tellExported": {"action": "send", "channel": {"$ref": f"#/channels/{EXPORTED}"}},
            "tellExportFailed": {"action": "send", "channel": {"$ref": f"#/channels/{EXPORT_FAILED}"}},
        },
        "components": {"messages": messages},
    }


def documents() -> dict[str, str]:
    """Return file name and text of every generated document."""
    found = {f"{kind}.schema.json": event_schema(kind) for kind in DATA}
    found["asyncapi.json"] = asyncapi()
    return {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in found.items()}


def write_schemas(folder: Path | None) -> int:
    """Print all documents, or write them into a folder."""
    for name, text in documents().items():
        if folder is None:
            console.out.out(text, end="")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
            console.say(f"{folder / name} written")
    return 0
