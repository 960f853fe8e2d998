"""Real servers for the tests: each starts when the first test asks for it and ends with the test run."""

import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.servers.cdcs import CdcsServer
from tools.servers.postgresql import PostgresServer
from tools.servers.rabbitmq import RabbitServer

# The settings of whoever runs the tests must not decide what the tests see.
for _name in [name for name in os.environ if name.startswith("NX_")]:
    del os.environ[_name]
# A shell that runs the tests in the background has SIGINT ignored, and every program started here would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """Give a RabbitMQ node of this test run, with the management API; the environment may name another one."""
    root = os.environ.get("NEXUS_TEST_RABBITMQ_ROOT")
    folder = tmp_path_factory.mktemp("rabbitmq")
    server = RabbitServer(folder, management=True, root=Path(root) if root else None)
    server.start()
    try:
        yield server
    finally:
        # The management plugin delays an orderly stop by 5 s, for data that is thrown away here.
        server.kill()
        shutil.rmtree(server.folder / "data")


@pytest.fixture
def amqp_url(rabbitmq: RabbitServer) -> Iterator[str]:
    """Give the address of an empty virtual host that belongs to this test."""
    rabbitmq.start()  # a test before may have left the node stopped
    name = f"test-{uuid.uuid4().hex[:12]}"
    yield rabbitmq.create_vhost(name)
    rabbitmq.start()
    rabbitmq.delete_vhost(name)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """Give a PostgreSQL cluster of this test run."""
    with PostgresServer(tmp_path_factory.mktemp("postgresql")) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Give the address of an empty database that belongs to this test; the test runs once for each kind."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path}/test.db"
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    server.start()  # a test before may have left the server stopped
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield server.create_database(name)
    server.start()
    server.drop_database(name)


@pytest.fixture(scope="session")
def cdcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CdcsServer]:
    """Give a real CDCS of this test run; its records are shared by all tests."""
    with CdcsServer(tmp_path_factory.mktemp("cdcs")) as server:
        yield server
