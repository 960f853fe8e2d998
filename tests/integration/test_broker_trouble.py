"""A broker that takes nothing for a while: what could not be confirmed comes later, with the same id and bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.integration.harness import WORK_QUEUE, WORKS, Bus, built, inline, site, small
from tools.servers.process import wait_for
from tools.servers.rabbitmq import RabbitServer

COUNT = 5
#: A publish waits 15 s for its confirm before it is tried again.
GIVEN_UP_SECONDS = 40.0


@contextmanager
def memory_alarm(rabbitmq: RabbitServer) -> Iterator[None]:
    """Let the broker take nothing from connections that have published."""
    rabbitmq.ctl("set_vm_memory_high_watermark", "absolute", "1")
    try:
        yield
    finally:
        rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")


def test_outcomes_wait_for_the_end_of_a_memory_alarm(tmp_path: Path, amqp_url: str, rabbitmq: RabbitServer) -> None:
    with site(tmp_path, amqp_url, plugins={"works": WORKS}) as (here, bus):
        bus.declare("listener")
        with Bus(amqp_url, queue="listener") as listener:
            here.start().shut_down()  # its queue is there, and takes events while nobody consumes
            ids = [f"event-{number}" for number in range(COUNT)]
            for number, event_id in enumerate(ids):
                record = small(number)
                bus.publish(built(event_id, inline(f"{number}.xml", record.content), event_id=event_id))
            with memory_alarm(rabbitmq):
                service = here.start()
                exported = "SELECT id FROM jobs WHERE state = 'exported'"
                service.wait_for(lambda: len(here.sql(exported)) == COUNT, "the exports")
                unsent = "SELECT seq FROM outbox WHERE sent_at IS NULL"
                service.wait_for_log('"publish_failed"', GIVEN_UP_SECONDS)
                assert len(here.sql(unsent)) == COUNT
                assert not listener.heard
            for event_id in ids:
                assert (
                    listener.outcome(event_id, log=service.log, seconds=GIVEN_UP_SECONDS).data["status"]
                    == "COMPLETED"
                )
            wait_for(lambda: here.sql(unsent) == [], GIVEN_UP_SECONDS, "an empty outbox", service.log)
            wait_for(lambda: bus.depth(WORK_QUEUE) == 0, GIVEN_UP_SECONDS, "an empty queue", service.log)
            for event_id in ids:
                assert len({item.body for item in listener.outcomes(event_id)}) == 1
            assert len(here.ledger("works")) == COUNT
