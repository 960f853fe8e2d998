"""The peer: the same work as a FastStream application, with the settings that make it fast.

Its RabbitMQ subscriber runs one task for each delivery, so the prefetch is its number of workers.
"""

import asyncio
import os

from faststream import AckPolicy, FastStream
from faststream.rabbit import Channel, ExchangeType, RabbitBroker, RabbitExchange, RabbitQueue
from faststream.rabbit.schemas.queue import QueueType

from benchmarks import messages

broker = RabbitBroker(
    os.environ.get(messages.URL_VARIABLE),
    default_channel=Channel(prefetch_count=messages.PREFETCH, on_return_raises=True),
    logger=None,  # two log lines a message would be measured otherwise
    apply_types=False,  # the handler takes bytes, there is nothing to convert
)
# declare=False: the queues are there already, the same for every consumer
exchange = RabbitExchange(messages.EXCHANGE, type=ExchangeType.TOPIC, durable=True, declare=False)
queue = RabbitQueue(messages.WORK_QUEUE, queue_type=QueueType.QUORUM, durable=True, declare=False)


@broker.subscriber(queue, exchange, ack_policy=AckPolicy.NACK_ON_ERROR)
@broker.publisher(
    routing_key=messages.EXPORTED,
    exchange=exchange,
    mandatory=True,
    persist=True,
    content_type=messages.CONTENT_TYPE,
)
async def handle(body: bytes) -> bytes:
    """Answer one event; FastStream publishes with confirms and acks afterwards."""
    return messages.outcome(body)


if __name__ == "__main__":
    asyncio.run(FastStream(broker, logger=None).run())
