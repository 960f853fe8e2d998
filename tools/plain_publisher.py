"""Announce every XML file of a folder as `record.built`, with nothing but aio-pika and the standard library.

This is what a record builder written by somebody else looks like; it knows the exchange and the event, no code of
this project. Run it as a script: python tools/plain_publisher.py FOLDER AMQP-URL
"""

import asyncio
import hashlib
import json
import sys
import uuid
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from pathlib import Path

import aio_pika

EXCHANGE = "nexuslims.records"
BUILT = "record.built"
NAMESPACE = "{https://data.nist.gov/od/dm/nexus/experiment/v1.0}"
QUEUE_SECONDS = 30  # how long the queue of the consumer may be missing


def event_of(path: Path, folder: Path) -> dict[str, object]:
    """Describe a record file: who it belongs to, where it is, and which bytes it has."""
    content = path.read_bytes()
    session = ET.fromstring(content).findtext(f"{NAMESPACE}id", "").strip()  # noqa: S314 - a file of our own
    return {
        "specversion": "1.0",
        "id": str(uuid.uuid4()),
        "source": "urn:example:plain-publisher",
        "type": BUILT,
        "subject": session,
        "time": datetime.now(UTC).isoformat(),
        "datacontenttype": "application/json",
        "data": {
            "session_identifier": session,
            "record": {
                "path": str(path.relative_to(folder)),
                "sha256": hashlib.sha256(content).hexdigest(),
                "size": len(content),
            },
        },
    }


async def publish(exchange: aio_pika.abc.AbstractExchange, event: dict[str, object]) -> None:
    """Publish one event; a broker that has no queue for it yet gives it back, then it is sent again."""
    message = aio_pika.Message(
        json.dumps(event).encode(),
        message_id=str(event["id"]),
        content_type="application/cloudevents+json",
        type=BUILT,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )
    async with asyncio.timeout(QUEUE_SECONDS):
        while True:
            try:
                await exchange.publish(message, BUILT, mandatory=True)
            except aio_pika.exceptions.DeliveryError:
                await asyncio.sleep(0.2)
            else:
                return


async def main(events: dict[str, dict[str, object]], url: str) -> None:
    """Publish all events, one after the other, and print each id with the name of its file."""
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
        for name, event in events.items():
            await publish(exchange, event)
            print(event["id"], name, sep="\t")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    asyncio.run(main({path.name: event_of(path, root) for path in sorted(root.glob("*.xml"))}, sys.argv[2]))
