"""Apache Kafka itself, from Maven Central, one broker in KRaft mode."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import maven
import servers

from deployment import free_port

VERSION = "4.1.0"
MISSING = maven.MISSING

_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
<modelVersion>4.0.0</modelVersion><groupId>t</groupId><artifactId>t</artifactId><version>1</version>
<packaging>pom</packaging>
<dependencies><dependency>
<groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{VERSION}</version>
</dependency><dependency>
<groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version>
</dependency></dependencies>
</project>
"""


def jars() -> Path | None:
    """Return the folder with Kafka's jars, fetched once; None without Java or Maven."""
    return maven.fetched(f"kafka-{VERSION}-with-log", _fetch)


def _fetch(folder: Path) -> None:
    (folder / "pom.xml").write_text(_POM)
    options = (f"-DoutputDirectory={folder}", "-DincludeScope=runtime")
    maven.run("dependency:copy-dependencies", *options, cwd=folder)


def server(cluster: str | None = None, **settings: Any) -> servers.Server | None:
    """
    Kafka; None if it is not to be had.

    :param cluster: the id of the cluster that it is a part of; None is one of its own.
    :param settings: go into its file, with dots for underscores.
    """
    folder = jars()
    if folder is None:
        return None
    java = [
        "java", "-Xmx400m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dorg.slf4j.simpleLogger.showDateTime=true",
        "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss",
        "-Dorg.slf4j.simpleLogger.log.org.apache.kafka.clients.NetworkClient=error", "-cp", f"{folder}/*",
    ]  # fmt: skip

    def command(server: servers.Server) -> list[str]:
        file = server.folder / "server.properties"
        if not file.exists():
            controller = next(port for port in iter(free_port, None) if port != server.port)
            about = {
                "process.roles": "broker,controller",
                "node.id": 1,
                "controller.quorum.voters": f"1@127.0.0.1:{controller}",
                "listeners": f"PLAINTEXT://127.0.0.1:{server.port},CONTROLLER://127.0.0.1:{controller}",
                "advertised.listeners": f"PLAINTEXT://127.0.0.1:{server.port}",
                "controller.listener.names": "CONTROLLER",
                "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
                "log.dirs": server.folder / "log",
                "offsets.topic.replication.factor": 1,
                "offsets.topic.num.partitions": 2,
                "transaction.state.log.replication.factor": 1,
                "transaction.state.log.min.isr": 1,
                "transaction.state.log.num.partitions": 2,
                "share.coordinator.state.topic.replication.factor": 1,
                "share.coordinator.state.topic.min.isr": 1,
                "group.initial.rebalance.delay.ms": 0,
                "log.retention.check.interval.ms": 1000,
                "log.segment.delete.delay.ms": 100,
                "log.cleaner.backoff.ms": 500,
                **{name.replace("_", "."): value for name, value in settings.items()},
            }
            file.write_text("".join(f"{name}={value}\n" for name, value in about.items()))
            named = f"--cluster-id={cluster or new_id()}"  # which may begin with a dash
            done = subprocess.run(
                [*java, "kafka.tools.StorageTool", "format", named, "-c", str(file)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
        return [*java, "kafka.Kafka", str(file)]

    return servers.Server(command, _answers)


def new_id() -> str:
    """Make an id for a cluster."""
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


def _answers(server: servers.Server) -> bool:
    return _lists({"bootstrap.servers": f"127.0.0.1:{server.port}", "log_level": 0})


def _lists(settings: dict[str, Any]) -> bool:
    """Whether there is a broker that has joined its cluster; an open port is not one."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    try:
        return bool(AdminClient(settings).list_topics(timeout=2).brokers)
    except KafkaException:
        return False


MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


class Guarded(servers.Server):
    """
    Kafka with users, of whom all but ``admin`` need to be allowed what they do; a password is NAME-secret.

    ``admin`` may prove it by any of `MECHANISMS`, the others by ``PLAIN`` alone; all by a `token`.

    :ivar tls_port: where it speaks TLS, with a certificate that ``ca.pem`` in its folder has signed.
    """

    tls_port: int

    def start(self) -> None:
        super().start()
        _let_scram(self)


def guarded() -> Guarded | None:
    """Such a Kafka; None if it is not to be had."""
    users = " ".join(f'user_{name}="{name}-secret"' for name in ("admin", "reader", "nobody"))
    plain = server()
    if plain is None:
        return None

    def command(server: servers.Server) -> list[str]:
        assert isinstance(server, Guarded)
        new = not (server.folder / "server.properties").exists()
        line = plain._command(server)
        if new:
            _certify(server.folder)
            file = server.folder / "server.properties"
            listeners = f"SASL_PLAINTEXT://127.0.0.1:{server.port},SASL_SSL://127.0.0.1:{server.tls_port}"
            text = file.read_text().replace(f"PLAINTEXT://127.0.0.1:{server.port}", listeners)
            text = text.replace(",PLAINTEXT:PLAINTEXT", ",SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL")
            text += (
                "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer\n"
                "super.users=User:admin;User:ANONYMOUS\n"
                "inter.broker.listener.name=SASL_PLAINTEXT\n"
                f"sasl.enabled.mechanisms={','.join(MECHANISMS)},OAUTHBEARER\nsasl.mechanism.inter.broker.protocol=PLAIN\n"
                f"ssl.keystore.type=PEM\nssl.keystore.location={server.folder}/broker.pem\n"
            )
            for listener in ("sasl_plaintext", "sasl_ssl"):
                text += (
                    f"listener.name.{listener}.plain.sasl.jaas.config="
                    "org.apache.kafka.common.security.plain.PlainLoginModule required "
                    f'username="admin" password="admin-secret" {users};\n'
                )
                for mechanism in MECHANISMS[1:]:
                    text += (
                        f"listener.name.{listener}.{mechanism.lower()}.sasl.jaas.config="
                        "org.apache.kafka.common.security.scram.ScramLoginModule required;\n"
                    )
                text += (  # which takes any token that is a JWT without a signature
                    f"listener.name.{listener}.oauthbearer.sasl.jaas.config="
                    "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required;\n"
                )
            file.write_text(text)
        return line

    found = Guarded(command, lambda server: _lists(as_admin(server)))
    found.tls_port = next(port for port in iter(free_port, None) if port != found.port)
    return found


def _certify(folder: Path) -> None:
    """Make a certificate for the broker, the CA that signed it, and one that did not (``other.pem``)."""
    import trustme
    from cryptography.hazmat.primitives import serialization

    ca = trustme.CA()
    issued = ca.issue_cert("127.0.0.1")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
    (folder / "broker.pem").write_bytes(key + chain)
    (folder / "ca.pem").write_bytes(ca.cert_pem.bytes())
    (folder / "other.pem").write_bytes(trustme.CA().cert_pem.bytes())


def _let_scram(server: servers.Server) -> None:
    """Give ``admin`` what SCRAM needs, as an operator does."""
    from confluent_kafka.admin import (
        AdminClient,
        ScramCredentialInfo,
        ScramMechanism,
        UserScramCredentialUpsertion,
    )

    admin = AdminClient(as_admin(server))
    for mechanism in MECHANISMS[1:]:  # a request may name a user once
        about = ScramCredentialInfo(ScramMechanism[mechanism.replace("-", "_")], 4096)
        wanted = UserScramCredentialUpsertion("admin", about, b"admin-secret")
        admin.alter_user_scram_credentials([wanted])["admin"].result(30)


def token(config: str) -> tuple[str, float]:
    """Return a token for ``config``, the extra ``sasl.oauthbearer.config``, or ``admin``; and when it ends."""
    if config == "none":
        raise RuntimeError("nobody gives one")
    now = time.time()
    claims = {"sub": config or "admin", "iat": now - 1, "exp": now + 300}
    parts = (json.dumps(part).encode() for part in ({"alg": "none"}, claims))
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts) + ".", now + 300


def as_admin(server: servers.Server) -> dict[str, Any]:
    return {
        "bootstrap.servers": f"127.0.0.1:{server.port}", "security.protocol": "SASL_PLAINTEXT", "log_level": 0,
        "sasl.mechanism": "PLAIN", "sasl.username": "admin", "sasl.password": "admin-secret",
    }  # fmt: skip


def allow(server: servers.Server, user: str, name: str, kind: Any = None) -> None:
    """Let a user read a topic, which is made; or what else has the name, of a `confluent_kafka` ResourceType."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import (
        AclBinding,
        AclOperation,
        AclPermissionType,
        AdminClient,
        NewTopic,
        ResourcePatternType,
        ResourceType,
    )

    admin = AdminClient(as_admin(server))
    if kind is None:
        with contextlib.suppress(KafkaException):  # it is there
            admin.create_topics([NewTopic(name, 1, 1)])[name].result(30)
    rule = AclBinding(
        kind or ResourceType.TOPIC, name, ResourcePatternType.LITERAL, f"User:{user}", "*", AclOperation.READ,
        AclPermissionType.ALLOW,
    )  # fmt: skip
    admin.create_acls([rule])[rule].result(30)
