"""A private RabbitMQ node that owns nothing outside its folder, for tests, the demo and measurements."""

import base64
import contextlib
import http.client
import json
import os
import secrets
import socket
import subprocess
from pathlib import Path
from typing import Any, Self

from tools.servers.ports import free_port, is_free
from tools.servers.process import Child, ServerError, clean_environment

# Debian's /usr/sbin/rabbitmq-server becomes the user rabbitmq; these scripts run as whoever calls them, so
# that the folder belongs to the caller.
SCRIPTS = Path("/usr/lib/rabbitmq/bin")
START_SECONDS = 60
STOP_SECONDS = 20
GUEST = "Basic " + base64.b64encode(b"guest:guest").decode()
AMQP_HEADER = b"AMQP\x00\x00\x09\x01"
# Runs a program in another root folder, with the node's own folder at its place there. The mounts belong to the
# program alone: they are gone with it, however it ends.
IN_ROOT = """set -e
for name in proc dev; do mount --rbind "/$name" "$0/$name"; done
mkdir -p "$0$1"
mount --bind "$1" "$0$1"
root=$0
shift
exec chroot "$root" "$@"
"""


class RabbitServer:
    """One RabbitMQ node. Its data, name and ports stay in the folder and serve the next start there again.

    With `root` the programs of that root folder run (another Debian, see debian13.py), which only root may do.
    """

    def __init__(
        self, folder: Path, *, port: int | None = None, management: bool = False, root: Path | None = None
    ) -> None:
        self.folder = folder.resolve()
        self._root = root.resolve() if root else None
        self._wanted_port = port
        self._management = management
        self._child: Child | None = None
        self.name = ""
        self.port = 0
        self.dist_port = 0
        self.management_port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The AMQP address of the default virtual host."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    @property
    def management_url(self) -> str | None:
        """The base address of the HTTP API and its pages, None without management."""
        return f"http://127.0.0.1:{self.management_port}/" if self._management else None

    @property
    def pid(self) -> int:
        """The Erlang process, the one to stop or kill; ServerError when the node does not run."""
        if self._child is None:
            raise ServerError("RabbitMQ is not running")
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether start() was called and neither stop() nor kill() since."""
        return self._child is not None

    def start(self) -> None:
        """Start the node and return when it answers; it does nothing when already started."""
        if self._child is not None:
            return
        installed = (self._root or Path("/")) / SCRIPTS.relative_to("/") / "rabbitmq-server"
        if not os.path.lexists(installed):  # in another root its target is not where the link says
            raise ServerError(f"there is no {installed}; run `sh tools/packages.sh rabbitmq`")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._choose_names()
        self._write_configuration()
        child = Child(
            self._command("rabbitmq-server"),
            env=self._environment(),
            log=self.folder / "server.log",
            cwd=self.folder,
        )
        child.wait_until(self._answers, START_SECONDS, f"RabbitMQ {self.name} on port {self.port}")
        self._child = child

    def stop(self) -> None:
        """Stop the node in order; it does nothing when not started."""
        if self._child is not None:
            self._child.stop(STOP_SECONDS)
            self._child = None

    def kill(self) -> None:
        """SIGKILL the Erlang process, as a crash would; returns when it is gone."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def restart(self) -> None:
        """Start again, after stop() if it runs, with the same data and, if still free, the same ports."""
        self.stop()
        self.start()

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl against this node and return what it printed."""
        # Without these it takes a port from 35672 up, which any client of this machine may hold.
        own_port = str(free_port())
        result = subprocess.run(
            self._command("rabbitmqctl", "--node", self.name, *arguments),
            env=clean_environment(
                HOME=str(self.folder),
                RABBITMQ_CONF_ENV_FILE=str(self.folder / "env.conf"),
                RABBITMQ_CTL_DIST_PORT_MIN=own_port,
                RABBITMQ_CTL_DIST_PORT_MAX=own_port,
            ),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if result.returncode != 0:
            raise ServerError(f"rabbitmqctl {' '.join(arguments)}: {result.stderr.strip()}")
        return result.stdout

    def api(self, method: str, path: str, body: object = None) -> Any:
        """Call the management API (`path` follows `/api/`) and return its JSON, None when there is none.

        Twenty times as fast as rabbitmqctl; but what it tells of queues is up to 5 s old.
        """
        if not self._management:
            raise ServerError("the HTTP API needs RabbitServer(..., management=True)")
        connection = http.client.HTTPConnection("127.0.0.1", self.management_port, timeout=30)
        headers = {"Authorization": GUEST, "Content-Type": "application/json"}
        try:
            connection.request(method, f"/api/{path}", json.dumps(body).encode(), headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status >= http.client.BAD_REQUEST:
            raise ServerError(f"{method} {path}: {answer.status} {content.decode(errors='replace')}")
        return json.loads(content) if content else None

    def create_vhost(self, name: str) -> str:
        """Create a virtual host that `guest` may use and return its AMQP address. Needs management."""
        self.api("PUT", f"vhosts/{name}", {})
        rights = {"configure": ".*", "write": ".*", "read": ".*"}
        self.api("PUT", f"permissions/{name}/guest", rights)
        return self.url + name

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all it holds, closing the connections to it. Needs management."""
        self.api("DELETE", f"vhosts/{name}")

    def _command(self, program: str, *arguments: str) -> list[str]:
        command = [str(SCRIPTS / program), *arguments]
        if self._root is None:
            return command
        return ["unshare", "--mount", "/bin/sh", "-c", IN_ROOT, str(self._root), str(self.folder), *command]

    def _choose_names(self) -> None:
        """Take name and ports from the folder's last start; a port that is taken now is chosen anew.

        The name never changes: RabbitMQ files its data under it.
        """
        memory = self.folder / "node.json"
        known = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
        self.name = known.get("name") or f"nexus-{secrets.token_hex(4)}@localhost"
        if self._wanted_port is not None and not is_free(self._wanted_port):
            raise ServerError(f"port {self._wanted_port} of 127.0.0.1 is taken by another program")
        self.port = self._wanted_port or _kept_or_free(known.get("port"))
        self.dist_port = _kept_or_free(known.get("dist_port"))
        self.management_port = _kept_or_free(known.get("management_port"))
        names = {
            "name": self.name,
            "port": self.port,
            "dist_port": self.dist_port,
            "management_port": self.management_port,
        }
        memory.write_text(json.dumps(names), encoding="utf-8")

    def _write_configuration(self) -> None:
        plugins = "[rabbitmq_management]." if self._management else "[]."
        (self.folder / "plugins").write_text(plugins + "\n", encoding="ascii")
        settings = ["listeners.tcp.default = 127.0.0.1:" + str(self.port)]
        if self._management:
            settings += [
                "management.tcp.ip = 127.0.0.1",
                f"management.tcp.port = {self.management_port}",
            ]
        (self.folder / "rabbitmq.conf").write_text("\n".join(settings) + "\n", encoding="ascii")
        # An empty file of our own, since otherwise the machine's /etc/rabbitmq would speak too.
        (self.folder / "env.conf").touch()

    def _environment(self) -> dict[str, str]:
        here = self.folder
        return clean_environment(
            HOME=str(here),  # the Erlang cookie
            RABBITMQ_NODENAME=self.name,
            RABBITMQ_NODE_PORT=str(self.port),
            RABBITMQ_NODE_IP_ADDRESS="127.0.0.1",
            RABBITMQ_DIST_PORT=str(self.dist_port),
            RABBITMQ_MNESIA_BASE=str(here / "data"),
            RABBITMQ_LOG_BASE=str(here / "log"),
            RABBITMQ_PID_FILE=str(here / "pid"),
            RABBITMQ_ENABLED_PLUGINS_FILE=str(here / "plugins"),
            RABBITMQ_FEATURE_FLAGS_FILE=str(here / "feature_flags"),
            RABBITMQ_CONF_ENV_FILE=str(here / "env.conf"),
            RABBITMQ_CONFIG_FILE=str(here / "rabbitmq.conf"),
            RABBITMQ_ADVANCED_CONFIG_FILE=str(here / "advanced.config"),
            RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="-kernel inet_dist_use_interface {127,0,0,1}",
            # The script then becomes the Erlang process instead of watching it from a shell, so that the
            # process we started is the one in the pid file.
            RUNNING_UNDER_SYSTEMD="true",
        )

    def _answers(self) -> bool:
        """Whether AMQP is spoken (rabbitmqctl would tell the same, a second later) and the plugin serves."""
        return _speaks_amqp(self.port) and (not self._management or _speaks_http(self.management_port))


def _kept_or_free(port: int | None) -> int:
    return port if port and is_free(port) else free_port()


def _speaks_amqp(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(AMQP_HEADER)
        # A method frame (Connection.Start); a node that is still booting closes or stays silent.
        return connection.recv(1) == b"\x01"
    return False


def _speaks_http(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("HEAD", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True
