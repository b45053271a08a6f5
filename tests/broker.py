"""A real Apache Kafka for the tests: one KRaft node, which can be killed, stopped and started again on its data.

`KAFKA_LIBS` names a folder of Kafka's jars (the `libs` of its distribution; Java 17 runs them). Without it, a Docker engine
runs the official image; without either, the tests that need a broker skip, and say so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from kafka import KafkaAdminClient

IMAGE = "apache/kafka:4.3.1"
CLUSTER = "MkU3OEVBNTcwNTJENDM2Qg"
START_S = 90.0

SETTINGS = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=CLIENTS://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}{inner}
advertised.listeners=CLIENTS://127.0.0.1:{advertised}{inner}
controller.listener.names=CONTROLLER
inter.broker.listener.name={between}
listener.security.protocol.map=CLIENTS:{protocol},CONTROLLER:PLAINTEXT,INNER:PLAINTEXT
log.dirs={folder}/logs
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
group.initial.rebalance.delay.ms=0
# a killed broker may come back only when its old session has run out: 9 s by default
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
controller.quorum.election.timeout.ms=300
controller.quorum.fetch.timeout.ms=600
"""
LOGIN = """
sasl.enabled.mechanisms=PLAIN
listener.name.clients.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required {users};
"""


def why_not() -> str | None:
    """Why no broker can be run here; None where one can."""
    if os.environ.get("KAFKA_LIBS"):
        return None if shutil.which("java") else "KAFKA_LIBS is set, but there is no java to run them with"
    engine = shutil.which("docker")
    if engine and subprocess.run([engine, "info"], capture_output=True).returncode == 0:
        return None
    return "no Kafka: set KAFKA_LIBS to a folder of its jars (and install Java 17), or start a Docker engine"


def free_port() -> int:
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, each another."""
    with contextlib.ExitStack() as held:
        servers = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


class Broker:
    """One node, with its data in `folder`."""

    def __init__(self, folder: Path, advertised: int | None = None, users: Mapping[str, str] | None = None) -> None:
        """`advertised`: the port that clients are sent to, where that is a relay in front of the broker's own.

        `users`: names and passwords of those who may log in, by SASL's PLAIN; none: nobody needs to.
        """
        self.folder = folder
        self.port, self._controller, inner = free_ports(3)
        self.bootstrap = f"127.0.0.1:{advertised or self.port}"
        folder.mkdir(parents=True)
        settings = SETTINGS.format(
            port=self.port,
            controller=self._controller,
            folder=folder,
            advertised=advertised or self.port,
            protocol="SASL_PLAINTEXT" if users else "PLAINTEXT",
            between="INNER" if users else "CLIENTS",
            inner=f",INNER://127.0.0.1:{inner}" if users else "",
        )
        if users:
            settings += LOGIN.format(users=" ".join(f'user_{name}="{word}"' for name, word in users.items()))
        self._open = not users
        (folder / "server.properties").write_text(settings)
        self._process: subprocess.Popen[bytes] | None = None
        libs = os.environ.get("KAFKA_LIBS")
        java = ["java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
        self._java = [*java, "-Xmx256m", "-cp", f"{libs}/*"] if libs else None

    def start(self) -> None:
        """Start, or start again on the same data; returns once a client is answered."""
        with (self.folder / "broker.log").open("ab") as out:
            if self._java and not (self.folder / "logs").exists():
                form = ["kafka.tools.StorageTool", "format", "-t", CLUSTER, "-c", self.folder / "server.properties"]
                subprocess.run([*self._java, *map(str, form)], stdout=out, stderr=out, check=True)
            self._process = subprocess.Popen(self._command(), stdout=out, stderr=out, start_new_session=True)
        self._wait_until_it_answers()

    def empty(self) -> None:
        """Delete every topic."""
        with self._admin() as admin:
            topics = [topic for topic in admin.list_topics() if not topic.startswith("__")]
            if topics:
                admin.delete_topics(topics)
            while set(topics) & set(admin.list_topics()):
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL: as the power going."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nobody answers."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)

    def _command(self) -> list[str]:
        if self._java:
            return [*self._java, "kafka.Kafka", str(self.folder / "server.properties")]
        properties = f"{self.folder}/server.properties:/mnt/shared/config/server.properties:ro"
        data = f"{self.folder}:{self.folder}"
        return ["docker", "run", "--rm", "--network=host", f"--user={os.getuid()}", "-v", properties, "-v", data, IMAGE]

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
        self._process.wait(60)
        self._process = None

    def _wait_until_it_answers(self) -> None:
        give_up = time.monotonic() + START_S
        while True:
            assert self._process is not None
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                break
            said = (self.folder / "broker.log").read_text(errors="replace")[-2000:]
            assert self._process.poll() is None, f"the broker ended: {said}"
            assert time.monotonic() < give_up, f"the broker does not answer: {said}"
            time.sleep(0.1)
        if self._open:
            with self._admin() as admin:
                admin.list_topics()

    def _admin(self) -> contextlib.closing[KafkaAdminClient]:
        return contextlib.closing(KafkaAdminClient(bootstrap_servers=f"127.0.0.1:{self.port}"))


@contextlib.contextmanager
def broker(folder: Path, advertised: int | None = None, users: Mapping[str, str] | None = None) -> Iterator[Broker]:
    """A broker that runs until the block ends, whatever was done to it."""
    one = Broker(folder, advertised, users)
    one.start()
    try:
        yield one
    finally:
        one.kill()
