"""The floor: the shortest honest aio-pika program that does what a consumer of this project does.

It keeps no memory, so a crash repeats work that this project does once. What it costs is what the broker and
the client library cost.
"""

import asyncio
import os
import signal

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from benchmarks import messages


async def main() -> None:
    """Answer every message of the work queue until SIGTERM; the answer is confirmed before the ack."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    connection = await aio_pika.connect_robust(os.environ[messages.URL_VARIABLE])
    async with connection:
        # a message that no queue takes must fail loudly, as it would in a program that cares
        channel = await connection.channel(on_return_raises=True)
        await channel.set_qos(prefetch_count=messages.PREFETCH)
        exchange = await channel.get_exchange(messages.EXCHANGE)
        queue = await channel.get_queue(messages.WORK_QUEUE)

        async def handle(message: AbstractIncomingMessage) -> None:
            async with message.process(requeue=True):
                answer = aio_pika.Message(
                    messages.outcome(message.body),
                    content_type=messages.CONTENT_TYPE,
                    delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                )
                await exchange.publish(answer, messages.EXPORTED, mandatory=True)

        # aio-pika runs one task for each delivery: up to PREFETCH of them wait for their confirms together
        tag = await queue.consume(handle)
        await stop.wait()
        await queue.cancel(tag)


if __name__ == "__main__":
    asyncio.run(main())
