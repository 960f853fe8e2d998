"""The private servers do what the other tests take for granted."""

import uuid

import aio_pika
import asyncpg
import httpx
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tools.servers.cdcs import CdcsServer
from tools.servers.ports import HIGHEST, LOWEST, free_port
from tools.servers.postgresql import PostgresServer
from tools.servers.rabbitmq import RabbitServer

RECORD = """<?xml version="1.0" encoding="UTF-8"?>
<Experiment xmlns="https://data.nist.gov/od/dm/nexus/experiment/v1.0">
  <title>A session</title>
  <summary><experimenter>somebody</experimenter></summary>
</Experiment>
"""


def test_ports_differ_and_are_not_ephemeral() -> None:
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    assert all(LOWEST <= port <= HIGHEST for port in ports)


async def test_rabbitmq_keeps_a_persistent_message_when_killed(rabbitmq: RabbitServer, amqp_url: str) -> None:
    async with await aio_pika.connect(amqp_url) as connection, connection.channel() as channel:
        await channel.declare_queue("kept", durable=True)
        message = aio_pika.Message(b"still here", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, routing_key="kept")
    rabbitmq.kill()
    rabbitmq.restart()
    async with await aio_pika.connect(amqp_url) as connection, connection.channel() as channel:
        queue = await channel.declare_queue("kept", passive=True)
        received = await queue.get()
        assert received.body == b"still here"
        await received.ack()


def test_rabbitmqctl_speaks_to_the_private_node(rabbitmq: RabbitServer, amqp_url: str) -> None:
    assert amqp_url.rpartition("/")[2] in rabbitmq.ctl("list_vhosts", "--silent").split()


async def test_postgresql_keeps_a_row_when_killed(postgres: PostgresServer) -> None:
    connection = await asyncpg.connect(postgres.url(driver="postgresql"))
    await connection.execute("CREATE TABLE kept (word text)")
    await connection.execute("INSERT INTO kept VALUES ('still here')")
    await connection.close()
    postgres.kill()
    postgres.restart()
    connection = await asyncpg.connect(postgres.url(driver="postgresql"))
    assert await connection.fetchval("SELECT word FROM kept") == "still here"
    await connection.execute("DROP TABLE kept")
    await connection.close()


async def test_database_url_is_an_empty_database(database_url: str) -> None:
    engine = create_async_engine(database_url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE word (word text)"))
        assert (await connection.execute(text("SELECT count(*) FROM word"))).scalar() == 0
    await engine.dispose()


def cdcs_client(server: CdcsServer, token: str) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"Authorization": f"Token {token}"}, trust_env=False)


def test_cdcs_lists_the_nexus_template_after_another_one(cdcs: CdcsServer) -> None:
    with cdcs_client(cdcs, cdcs.plain_token) as client:
        titles = [entry["title"] for entry in client.get("rest/template-version-manager/global/").json()]
    # other tests may have added schemas of their own behind them
    assert titles[:2] == ["Another Schema", "Nexus Experiment Schema"]


def test_cdcs_stores_a_record_byte_for_byte_across_a_kill(cdcs: CdcsServer) -> None:
    title = f"servers {uuid.uuid4()}"
    with cdcs_client(cdcs, cdcs.admin_token) as client:
        managers = client.get("rest/template-version-manager/global/").json()
        template = managers[1]["current"]
        created = client.post("rest/data/", json={"template": template, "title": title, "xml_content": RECORD})
        assert created.status_code == 201, created.text
        cdcs.kill()
        cdcs.restart()
        stored = client.get(f"rest/data/{created.json()['id']}/").json()
        assert (stored["title"], stored["xml_content"]) == (title, RECORD)
        assert client.get(f"data?id={stored['id']}").status_code == 200


def test_cdcs_answers_a_bad_token_with_403_as_in_production(cdcs: CdcsServer) -> None:
    with cdcs_client(cdcs, "c" * 40) as client:
        assert client.post("rest/data/", json={}).status_code == 403
