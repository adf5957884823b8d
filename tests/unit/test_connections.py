"""What a connection says is used, or refused by its name; nothing is passed over. No server is asked here."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import sys
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace

import aiormq
import botocore.exceptions
import pytest
import trustme
from airflow.sdk.exceptions import AirflowNotFoundException
from airflow_events.errors import SourceMisconfigured, SourceMissing
from airflow_events.listeners.kafka import client as kafka
from airflow_events.listeners.kafka import schemas
from airflow_events.listeners.nats import client as nats
from airflow_events.listeners.postgres import client as postgres
from airflow_events.listeners.rabbitmq import client as rabbitmq
from airflow_events.listeners.redis import client as redis
from airflow_events.listeners.sqs import client as sqs
from airflow_events.listeners.support import connections
from airflow_events.provider_info import get_provider_info
from confluent_kafka import KafkaError, KafkaException
from redis.exceptions import ClusterError, MovedError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError


@pytest.fixture
def connect(monkeypatch):
    """Lay down the connection ``own``: its fields, or its URI."""

    def laid(uri=None, **fields):
        monkeypatch.setenv("AIRFLOW_CONN_OWN", uri or json.dumps(fields))

    return laid


async def kafka_settings(group="airflow"):
    return await kafka._settings(kafka.Source("own", ("topic",), group))


async def rabbitmq_url(monkeypatch):
    """Return the URL that the client is given, and the rest that it is."""
    given = []

    async def taken(url, **options):
        given.append((url, options))

    monkeypatch.setattr(aiormq, "connect", taken)
    await rabbitmq.connect("own")
    return given[-1]


async def nats_options(monkeypatch):
    given = []

    async def opened(self, servers, **options):
        given.append((servers, options))

    monkeypatch.setattr(nats.Server, "open", opened)
    await nats.connect("own")
    return given[-1]


async def sqs_client():
    return await sqs.connect(sqs.Source("own", "eu-west-1", "orders"))


# By the type of a connection: who reads it, a misspelt extra, and what is meant.
READERS = {
    "redis": (lambda: redis.connect("own", 1), "ssl_cacerts", "ssl_ca_certs"),
    "nats": (lambda: nats.connect("own"), "nkeyseed", "nkey_seed"),
    "amqp": (lambda: rabbitmq.connect("own"), "ca_file", "cafile"),
    "postgres": (lambda: postgres.connect("own"), "ssl_mode", "sslmode"),
    "aws": (sqs_client, "region", "region_name"),
    "kafka": (kafka_settings, "sasl_mechanism", "sasl.mechanism"),
    "http": (lambda: schemas._settings("own"), "ssl.ca.loction", "ssl.ca.location"),
}


@pytest.mark.parametrize("kind", READERS)
async def test_a_misspelt_extra_is_refused_by_its_name(connect, kind):
    read, misspelt, meant = READERS[kind]
    connect(conn_type=kind, host="127.0.0.1", port=1, extra={misspelt: "x"})
    with pytest.raises(SourceMisconfigured) as refused:
        await read()
    told = str(refused.value)
    assert f"the connection 'own' has an extra {misspelt!r}, which is not known" in told
    assert f"did you mean {meant!r}?" in told
    assert told.split("known are ")[1].split(", ").count(meant) == 1


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("extra", ["{'db': 3}", "[1]", '"text"'])
async def test_extras_that_cannot_be_read_are_not_taken_as_none(connect, kind, extra):
    connect(conn_type=kind, host="127.0.0.1", port=1, extra=extra)
    with pytest.raises(SourceMisconfigured, match=r"'own' has extras that are not (valid JSON|a JSON object)"):
        await READERS[kind][0]()


async def test_an_extra_that_a_form_left_empty_is_none(connect):
    connect(conn_type="redis", extra={"db": None, "ssl": False, "ssl_ca_certs": "", "ssl_cert_reqs": "required"})
    client = await redis.connect("own", 1)
    assert client.connection_pool.connection_kwargs["db"] == 0


@pytest.mark.parametrize(
    ("kind", "name"), [("redis", "ssl"), ("amqp", "ssl"), ("nats", "tls"), ("postgres", "iam")]
)
async def test_a_yes_or_no_that_is_neither(connect, kind, name):
    connect(conn_type=kind, host="127.0.0.1", port=1, extra={name: "treu"})
    with pytest.raises(
        SourceMisconfigured, match=f"'own' has the extra {name}='treu', where true or false is needed"
    ):
        await READERS[kind][0]()


@pytest.mark.parametrize(
    ("kind", "host", "what"),
    [
        ("redis", "redis://me:Geheim@cache", "a login within its host"),
        ("nats", "nats://me:Geheim@a", "a login within its host"),
        ("amqp", "https://broker", "begins with https://, and amqp:// or amqps:// is needed"),
        ("redis", "cache:6379/3", "the host 'cache:6379/3'"),
        ("kafka", "a:9092,b:nine", "the host 'b:nine'"),
        ("kafka", ",", "the host ''"),
        ("postgres", "db:99999", "the host 'db:99999'"),
    ],
)
async def test_a_host_that_cannot_be_read(connect, kind, host, what):
    connect(conn_type=kind, host=host)
    with pytest.raises(SourceMisconfigured, match=f"the connection 'own' has .*{what}") as refused:
        await READERS[kind][0]()
    assert "Geheim" not in str(refused.value)


def test_addresses_of_ipv6():
    class Found:
        conn_id, host, port = "own", "[::1]:5433,fe80::1,db", 5432

    assert [each.address(1) for each in connections.endpoints(Found)] == [
        "[::1]:5433",
        "[fe80::1]:5432",
        "db:5432",
    ]


# TLS.


@pytest.fixture
def files(tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    return {"ca": str(tmp_path / "ca.pem"), "both": str(tmp_path / "both.pem")}


@pytest.mark.parametrize(
    ("kind", "secure", "name"),
    [("redis", "ssl", "ssl_ca_certs"), ("amqp", "ssl", "cafile"), ("nats", "tls", "tls_ca")],
)
async def test_files_for_tls(connect, files, kind, secure, name):
    read = READERS[kind][0]
    connect(conn_type=kind, host="127.0.0.1", port=1, extra={secure: True, name: "/none/ca.pem"})
    with pytest.raises(SourceMisconfigured, match=r"'own': a file that it names cannot be used: .*/none/ca\.pem"):
        await read()
    connect(conn_type=kind, host="127.0.0.1", port=1, extra={secure: True, name: __file__})
    with pytest.raises(SourceMisconfigured, match="'own' has a certificate or a key that cannot be used"):
        await read()
    if kind == "nats":  # where a certificate asks for TLS
        return
    connect(conn_type=kind, host="127.0.0.1", port=1, extra={secure: False, name: files["ca"]})
    with pytest.raises(
        SourceMisconfigured, match=f"'own' has the extra '{name}', which is for TLS, and no {secure}=true"
    ):
        await read()


async def test_a_scheme_of_tls_counts_though_a_form_says_no(connect, monkeypatch):
    for conn_type, host in (("rediss", "a"), ("redis", "rediss://a")):
        connect(conn_type=conn_type, host=host, extra={"ssl": False})
        assert (await redis.connect("own", 1)).connection_pool.connection_class is redis.SSLConnection
    for conn_type, host in (("amqps", "a"), ("amqp", "amqps://a")):
        connect(conn_type=conn_type, host=host, extra={"ssl": False, "ssl_verify": True, "heartbeat": 60})
        assert (await rabbitmq_url(monkeypatch))[0].scheme == "amqps"
    for conn_type, host in (("tls", "a"), ("nats", "tls://a")):
        connect(conn_type=conn_type, host=host, extra={"tls": False})
        assert "tls" in (await nats_options(monkeypatch))[1]


@pytest.mark.parametrize("kind", ["nats", "amqp"])
async def test_what_a_form_sends_that_nobody_filled_in_is_a_connection_without_tls(connect, monkeypatch, kind):
    [form] = [each for each in get_provider_info()["connection-types"] if each["connection-type"] == kind]
    connect(
        conn_type=kind, extra={name: field["schema"].get("default") for name, field in form["conn-fields"].items()}
    )
    if kind == "nats":
        assert await nats_options(monkeypatch) == (["nats://localhost:4222"], {})
    else:
        assert (await rabbitmq_url(monkeypatch))[0].scheme == "amqp"


def test_a_certificate_that_stands_in_the_connection_itself(files):
    text = {name: Path(file).read_text() for name, file in files.items()}
    context = connections.tls(text["ca"], text["both"], None)
    assert len(context.get_ca_certs()) == 1
    assert context.verify_mode is ssl.CERT_REQUIRED


# Redis.


@pytest.mark.parametrize(
    "uri",
    ["rediss://:pw@cache:6380/3", "redis://:pw@cache:6380/3?ssl=true", "redis://rediss://cache:6380/3?ssl=1"],
)
async def test_redis_by_tls(connect, uri):
    connect(uri)
    if uri.startswith("redis://rediss"):
        connect(conn_type="redis", host="rediss://cache", port=6380, schema="3", password="pw")
    pool = (await redis.connect("own", 1)).connection_pool
    assert pool.connection_class is redis.SSLConnection
    given = pool.connection_kwargs
    assert (given["host"], given["port"], given["db"], given["password"]) == ("cache", 6380, 3, "pw")
    assert (given["ssl_cert_reqs"], given["ssl_check_hostname"]) == ("required", True)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"extra": {"cluster": True, "db": 2}}, "is of a cluster, which has no database but 0"),
        ({"extra": {"cluster": True, "sentinel_master": "m"}}, "is of a cluster, which has .* no Sentinel"),
        ({"extra": {"startup_nodes": "a:1"}}, "'startup_nodes', which are a cluster's, and no cluster=true"),
        ({"host": "a,b"}, "names several hosts, and neither cluster=true nor a sentinel_master"),
        ({"schema": "3", "extra": {"db": 4}}, "has the schema '3', and the extra db=4"),
        ({"schema": "three"}, "has the schema 'three'"),
        ({"extra": {"db": "x"}}, "has the extra db='x', where a whole number is needed"),
        ({"extra": {"ssl": True, "ssl_cert_reqs": "require"}}, "ssl_cert_reqs='require', where 'required'"),
        ({"extra": {"ssl": True, "ssl_keyfile": "/k"}}, "names a key, and no certificate"),
    ],
)
async def test_a_connection_to_redis_that_contradicts_itself(connect, fields, what):
    connect(conn_type="redis", **fields)
    with pytest.raises(
        SourceMisconfigured, match=f"the connection 'own' {'has ' if what[0] == 's' else ''}.*{what}"
    ):
        await redis.connect("own", 1)


# RabbitMQ.


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({"conn_type": "amqp"}, "amqp://guest:guest@localhost:5672/"),
        ({"conn_type": "amqps", "host": "b"}, "amqps://guest:guest@b:5671/"),
        ({"conn_type": "amqp", "host": "amqps://b:5999"}, "amqps://guest:guest@b:5999/"),
        ({"conn_type": "rabbitmq", "host": "b", "schema": "prod/eu"}, "amqp://guest:guest@b:5672/prod/eu"),
        ({"conn_type": "amqp", "host": "b", "login": "me"}, "amqp://me:@b:5672/"),
        ({"conn_type": "amqp", "host": "b", "login": "m@e", "password": "p/w"}, "amqp://m%40e:p%2Fw@b:5672/"),
    ],
)
async def test_the_url_of_rabbitmq(connect, monkeypatch, fields, url):
    connect(**fields)
    given, options = await rabbitmq_url(monkeypatch)
    assert str(given.with_query(None)) == url
    assert ("context" in options) == url.startswith("amqps")


async def test_rabbitmq_as_other_hooks_have_it(connect, files, monkeypatch):
    pem = {name: Path(file).read_text() for name, file in files.items()}
    for extra in (
        {"ssl_ca_certs": files["ca"], "ssl_certfile": files["both"], "ssl_server_hostname": "b"},
        {"ssl_ca_cert_pem": pem["ca"], "ssl_cert_pem": pem["both"], "ssl_server_hostname": "b"},
    ):
        connect(conn_type="rabbitmq", extra={"ssl": True, **extra})
        _, options = await rabbitmq_url(monkeypatch)
        assert options["server_hostname"] == "b"
        assert len(options["context"].get_ca_certs()) == 1
    connect(conn_type="rabbitmq", extra={"ssl": True, "cafile": files["ca"], "ssl_ca_certs": files["ca"]})
    with pytest.raises(SourceMisconfigured, match="'ssl_ca_certs' and another that means 'cafile'"):
        await rabbitmq.connect("own")
    connect(conn_type="rabbitmq", extra={"connection_uri": "amqp://me:Geheim@b"})
    with pytest.raises(
        SourceMisconfigured, match="'connection_uri', which is refused: put what it says"
    ) as refused:
        await rabbitmq.connect("own")
    assert "Geheim" not in str(refused.value)
    connect(conn_type="rabbitmq", extra={"ssl": True, "ssl_verify": False})
    _, options = await rabbitmq_url(monkeypatch)
    assert options["context"].verify_mode is ssl.CERT_NONE


# NATS.


@pytest.mark.parametrize(
    ("fields", "login"),
    [
        ({"password": "secret"}, {"token": "secret"}),
        ({"login": "secret"}, {"token": "secret"}),
        ({"extra": {"token": "secret"}}, {"token": "secret"}),
        ({"login": "me", "password": "secret"}, {"user": "me", "password": "secret"}),
        ({"extra": {"nkey_seed": "SU"}}, {"nkeys_seed_str": "SU"}),
    ],
)
async def test_a_login_to_nats(connect, monkeypatch, fields, login):
    connect(conn_type="nats", **fields)
    assert await nats_options(monkeypatch) == (["nats://localhost:4222"], login)


async def test_two_logins_to_nats(connect):
    connect(conn_type="nats", password="secret", extra={"token": "other"})
    with pytest.raises(
        SourceMisconfigured, match="has the extra 'token' and a login or a password, of which there may be one"
    ):
        await nats.connect("own")


@pytest.mark.parametrize(
    ("fields", "servers"),
    [
        ({"conn_type": "tls", "host": "a,b:4333"}, ["tls://a:4222", "tls://b:4333"]),
        ({"conn_type": "nats", "host": "a,tls://b"}, ["nats://a:4222", "tls://b:4222"]),
        ({"conn_type": "generic", "host": "tls://a", "port": 4333}, ["tls://a:4333"]),
    ],
)
async def test_nats_by_tls(connect, monkeypatch, fields, servers):
    connect(**fields)
    given, options = await nats_options(monkeypatch)
    assert given == servers
    assert options["tls"].verify_mode is ssl.CERT_REQUIRED


# PostgreSQL.


@pytest.mark.parametrize(
    ("host", "port", "given"),
    [
        ("db", None, {"host": "db", "port": None}),
        ("a,b", 5433, {"host": "a,b", "port": "5433,5433"}),
        ("a:1,b", None, {"host": "a,b", "port": "1,"}),
        ("/run/postgresql", 5433, {"host": "/run/postgresql", "port": 5433}),
        (None, None, {"host": None, "port": None}),
    ],
)
def test_where_postgresql_is(host, port, given):
    class Found:
        conn_id = "own"

    Found.host, Found.port = host, port
    assert postgres._where(Found) == given


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ({"sslmode": "verify_full"}, 'cannot be used: .*invalid sslmode value: "verify_full"'),
        ({"connect_timeout": "ten"}, "cannot be used: .*connect_timeout"),
        ({"keepalives_idle": "x"}, "cannot be used: .*keepalives_idle"),
        ({"service": "nonesuch"}, 'cannot be used: .*"nonesuch" not found'),
        ({"sslrootcert": "/none.pem"}, r"a file that it names cannot be used: .*/none\.pem"),
        ({"iam": True}, "has the extra iam=true, and no token of AWS or Azure is fetched here"),
    ],
)
async def test_a_connection_to_postgresql_that_cannot_be_used(connect, extra, what):
    connect(conn_type="postgres", host="127.0.0.1", port=1, extra=extra)
    with pytest.raises(SourceMisconfigured, match=f"the connection 'own'.*{what}"):
        await postgres.connect("own")


# SQS.


@pytest.mark.parametrize(
    ("queue", "region"),
    [
        ("orders", None),
        ("arn:aws:sqs:eu-west-1:123456789012:orders.fifo", "eu-west-1"),
        ("arn:aws-us-gov:sqs:us-gov-west-1:123456789012:orders", "us-gov-west-1"),
        ("https://sqs.eu-west-1.amazonaws.com/123456789012/orders", "eu-west-1"),
        ("https://eu-west-1.queue.amazonaws.com/123456789012/orders", "eu-west-1"),
        ("https://cn-north-1.queue.amazonaws.com.cn/123456789012/orders", "cn-north-1"),
        ("https://queue.amazonaws.com/123456789012/orders", "us-east-1"),
        ("http://127.0.0.1:4566/000000000000/queue.amazonaws.com/", None),
    ],
)
def test_the_region_of_a_queue(queue, region):
    assert sqs.region_of(queue) == region


async def test_a_queue_of_another_region(connect):
    connect(conn_type="aws")
    with pytest.raises(SourceMisconfigured, match="of another region than region_name says"):
        await sqs.connect(sqs.Source("own", "eu-west-1", "arn:aws:sqs:us-east-1:123456789012:orders"))


@pytest.mark.parametrize("name", sqs._NO_MORE)
async def test_an_extra_that_the_amazon_provider_does_not_read_any_more(connect, name):
    connect(conn_type="aws", extra={name: "x"})
    with pytest.raises(
        SourceMisconfigured, match=f"'own' has an extra '{name}', which is refused: the Amazon provider"
    ):
        await sqs_client()


# Kafka.


@pytest.mark.parametrize(
    ("fields", "servers"),
    [
        ({"host": "a"}, "a:9092"),
        ({"host": "a", "port": 9093}, "a:9093"),
        ({"host": "a:9094"}, "a:9094"),
        ({"host": "a:9094, b,", "port": 9093}, "a:9094,b:9093"),
        ({"extra": {"bootstrap.servers": "c:1,d:2"}}, "c:1,d:2"),
        ({"extra": {"bootstrap.servers": ["c:1", "d:2"]}}, "c:1,d:2"),
        ({"extra": {"metadata.broker.list": "c:1"}}, "c:1"),
        ({"host": "d", "port": 2, "extra": {"bootstrap.servers": "c:1, d:2"}}, "c:1, d:2"),
        ({"host": "broker", "extra": {"bootstrap.servers": "broker:9093"}}, "broker:9093"),
        ({"host": "broker", "extra": {"bootstrap.servers": "broker"}}, "broker"),
        (
            {"host": "Broker", "port": 9093, "extra": {"bootstrap.servers": "SASL_SSL://broker:9093"}},
            "SASL_SSL://broker:9093",
        ),
        ({"host": "::1", "port": 2, "extra": {"bootstrap.servers": "[::1]:2"}}, "[::1]:2"),
    ],
)
async def test_the_brokers_of_kafka(connect, fields, servers):
    connect(conn_type="kafka", **fields)
    assert (await kafka_settings())["bootstrap.servers"] == servers


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"host": "a", "extra": {"bootstrap.servers": "b:9092"}}, "the host a, and the extra bootstrap"),
        ({"host": "a", "port": 9093, "extra": {"bootstrap.servers": "a:9092"}}, "the host a:9093, and the extra"),
        ({"host": "a", "extra": {"default.topic.config": {"x": 1}}}, "'default.topic.config', which is neither"),
        ({}, "neither 'bootstrap.servers' among its extras nor a host"),
        (
            {"host": "a", "login": "me"},
            "a login, which is used only with the extra security.protocol=sasl_ssl",
        ),
        ({"host": "a", "login": "me", "extra": {"sasl.username": "you"}}, "a login, and another one"),
        ({"host": "a", "extra": {"enable.auto.commit": True}}, "enable.auto.commit=True.*'false' is needed"),
        ({"host": "a", "extra": {"isolation.level": "read_uncommitted"}}, "isolation.level='read_uncommitted'"),
        ({"host": "a", "extra": {"client.id": {"x": 1}}}, "'client.id', which is neither text nor a number"),
    ],
)
async def test_a_connection_to_kafka_that_cannot_be_used(connect, fields, what):
    connect(conn_type="kafka", **fields)
    with pytest.raises(SourceMisconfigured, match=f"the connection 'own' has .*{what}"):
        await kafka_settings()


@pytest.mark.parametrize("name", sorted(kafka._PRODUCERS))
async def test_a_setting_of_a_producer(connect, name):
    connect(conn_type="kafka", host="a", extra={name: 5})
    with pytest.raises(
        SourceMisconfigured, match=f"'own' has an extra '{name}', which is refused: it is a producer's"
    ):
        await kafka_settings()


@pytest.mark.parametrize("name", sorted(kafka._KNOWN - {"oauth_cb", "logger", "on_delivery"}))
def test_what_is_named_here_the_client_knows(name):
    assert kafka._is_known(name)


def test_what_the_client_does_not_know():
    assert not kafka._is_known("bootstrap.server")
    assert kafka._is_known("socket.nagle.disable")  # which is not named here


async def test_settings_without_an_effect_are_told_once(connect, caplog):
    connect(conn_type="kafka", host="a", extra={
        "group.id": "theirs", "session.timeout.ms": 6000, "error_cb": "their.module.callback",
        "auto.offset.reset": "latest", "socket.nagle.disable": True,
    })  # fmt: skip
    kafka._idle_told.clear()
    with caplog.at_level(logging.WARNING, logger=kafka.log.name):
        settings = await kafka_settings()
        await kafka_settings()
    [record] = [record for record in caplog.records if record.name == kafka.log.name]
    for name in (
        "session.timeout.ms: the waits are no members of the group",
        "error_cb: ",
        "group.id: the group is",
    ):
        assert name in record.getMessage()
    assert not {"session.timeout.ms", "error_cb", "auto.offset.reset"} & set(settings)
    assert settings["socket.nagle.disable"] is True


@pytest.fixture
def tokens():
    """What a connection to Kafka is that logs in by tokens."""
    pytest.importorskip("airflow.providers.apache.kafka")
    return {"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER"}


async def test_the_tokens_of_msk_are_those_of_the_providers_hook(connect, monkeypatch, tokens):
    asked = []

    class Provider:
        @staticmethod
        def generate_auth_token(region):
            asked.append(region)
            return "token", 2_000_000

    connect(conn_type="kafka", host="b-1.demo.abcde1.c2.kafka.eu-west-1.amazonaws.com:9098", extra=tokens)
    monkeypatch.setitem(sys.modules, "aws_msk_iam_sasl_signer", None)
    with pytest.raises(SourceMisconfigured, match=r"'own' asks for a login by tokens.*apache-kafka\[msk\]"):
        await kafka_settings()
    monkeypatch.setitem(sys.modules, "aws_msk_iam_sasl_signer", SimpleNamespace(MSKAuthTokenProvider=Provider))
    assert (await kafka_settings())["oauth_cb"]("") == ("token", 2000)
    assert asked == ["eu-west-1"]


async def test_the_tokens_of_google_are_those_of_the_providers_hook(connect, monkeypatch, tokens):
    host = "bootstrap.demo.europe-west1.managedkafka.project.cloud.goog:9092"
    connect(conn_type="kafka", host=host, extra=tokens)
    module = "airflow.providers.google.cloud.hooks.managed_kafka"
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SourceMisconfigured, match=r"'own' asks for a login by tokens.*ManagedKafkaHook"):
        await kafka_settings()
    hook = SimpleNamespace(get_confluent_token=lambda _: ("token", 1))
    for parent in (
        "airflow.providers.google",
        "airflow.providers.google.cloud",
        "airflow.providers.google.cloud.hooks",
    ):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(ManagedKafkaHook=lambda: hook))
    assert (await kafka_settings())["oauth_cb"]("") == ("token", 1)


async def test_tokens_that_the_client_fetches_itself_ask_no_hook(connect, monkeypatch, tokens):
    monkeypatch.setitem(sys.modules, "airflow.providers.apache.kafka.hooks.base", None)
    connect(conn_type="kafka", host="a", extra={**tokens, "sasl.oauthbearer.method": "oidc"})
    assert "oauth_cb" not in await kafka_settings()
    connect(conn_type="kafka", host="a", extra={**tokens, "oauth_cb": "a.function"})
    with pytest.raises(
        SourceMisconfigured, match="'own' asks for a login by tokens, and the Kafka provider has none"
    ):
        await kafka_settings()


@pytest.mark.parametrize("kind", ["nats", "postgres", "redis"])
async def test_what_is_in_a_file_where_its_name_is_needed_is_not_told(connect, tmp_path, kind):
    """A private key, or a seed, would stand in the log of the task."""
    certificate, file = trustme.CA().issue_cert("a"), tmp_path / "certificate.pem"
    certificate.cert_chain_pems[0].write_to_path(file)
    key = certificate.private_key_pem.bytes().decode()
    extra = {
        "nats": {"credentials": key},
        "postgres": {"sslmode": "require", "sslcert": "/dev/null", "sslkey": key},
        "redis": {"ssl": True, "ssl_certfile": str(file), "ssl_keyfile": key},
    }[kind]
    connect(conn_type=kind, host="127.0.0.1", port=1, extra=extra)
    make = {"nats": nats.connect, "postgres": postgres.connect, "redis": lambda own: redis.connect(own, 1)}[kind]
    with pytest.raises(SourceMisconfigured) as refused:
        await make("own")
    assert "the content of a file where the name of one is needed" in str(refused.value)
    assert key.splitlines()[1] not in "".join(traceback.format_exception(refused.value))


async def test_what_is_on_one_long_line_is_not_told(connect):
    connect(conn_type="postgres", host="127.0.0.1", port=1, extra={"sslrootcert": "c2VjcmV0" * 1000})
    with pytest.raises(SourceMisconfigured, match="cannot be used: File name too long") as refused:
        await postgres.connect("own")
    assert "c2VjcmV0" not in "".join(traceback.format_exception(refused.value))


async def test_an_authority_of_redis_may_be_the_certificate_itself(connect):
    authority = trustme.CA().cert_pem.bytes().decode()
    connect(conn_type="redis", host="127.0.0.1", port=1, extra={"ssl": True, "ssl_ca_certs": authority})
    client = await redis.connect("own", 1)
    about = client.connection_pool.connection_kwargs
    assert (about["ssl_ca_data"], about.get("ssl_ca_certs")) == (authority, None)
    await client.aclose()


async def test_further_nodes_of_a_cluster_by_ipv6(connect):
    nodes = [{"host": "::1", "port": 7001}, "[::1]:7002", {"host": "b"}]
    connect(conn_type="redis", host="a", extra={"cluster": True, "startup_nodes": nodes})
    _, name = await redis.named("own", 1)
    assert name == "::1:7001,::1:7002,a:6379,b:6379/0"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("NOT_FOUND - queue 'orders' in vhost '/' process is stopped by supervisor", ConnectionError),
        ("NOT_FOUND - failed to perform operation on queue 'orders' in vhost '/' due to timeout", ConnectionError),
        ("NOT_FOUND - home node 'b' of durable queue 'orders' is down or inaccessible", ConnectionError),
        ("NOT_FOUND - no queue 'orders' in vhost '/'", SourceMissing),
    ],
)
def test_a_queue_whose_node_is_down_is_there(text, error):
    with pytest.raises(error), rabbitmq.refusals(rabbitmq.Source("own", "orders")):
        raise aiormq.exceptions.ChannelNotFoundEntity(text)


def test_a_stream_whose_node_is_down_is_there():
    said = "PRECONDITION_FAILED - stream queue 'orders' does not have a running replica on the local node"
    with pytest.raises(ConnectionError), rabbitmq.refusals(rabbitmq.Source("own", "orders")):
        raise aiormq.exceptions.ChannelPreconditionFailed(said)


async def test_a_default_connection_that_was_there_is_not_done_without(connect, monkeypatch):
    """The events would be those of another account's queue."""
    source = sqs.Source("aws_default", "orders", None)
    monkeypatch.setattr(sqs, "_found", set())
    assert await sqs._connection(source) is None
    monkeypatch.setenv("AIRFLOW_CONN_AWS_DEFAULT", json.dumps({"conn_type": "aws"}))
    assert await sqs._connection(source) is not None
    monkeypatch.delenv("AIRFLOW_CONN_AWS_DEFAULT")
    with pytest.raises(AirflowNotFoundException):
        await sqs._connection(source)


def test_an_instance_that_has_no_credentials_for_a_moment_is_asked_again(monkeypatch):
    monkeypatch.setattr(sqs, "_PAUSE", 0)
    answers = iter([None, None, "these"])
    assert sqs._credentials_of(SimpleNamespace(get_credentials=lambda: next(answers))) == "these"
    assert sqs._credentials_of(SimpleNamespace(get_credentials=lambda: None)) is None


@pytest.mark.parametrize(
    ("code", "message", "passes"),
    [
        ("RequestTimeout", "", True),
        ("IDPCommunicationError", "", True),
        ("InvalidIdentityToken", "Couldn't retrieve verification key from your identity provider", True),
        ("InvalidIdentityToken", "The token is not valid", False),
        ("InvalidParameterValue", "", False),
    ],
)
def test_what_passes_of_what_aws_says(code, message, passes):
    said = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    error = botocore.exceptions.ClientError(said, "AssumeRoleWithWebIdentity")
    with pytest.raises(sqs.AWAY if passes else botocore.exceptions.ClientError), sqs.refusals(SQS):
        raise error


SQS = sqs.Source("own", "orders", None)


@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (ResponseError("max number of clients + cluster connections reached"), ConnectionError, "max number"),
        (ResponseError("READONLY You can't write against a read only replica."), ConnectionError, "READONLY"),
        (ClusterError("TTL exhausted."), ClusterError, "TTL"),
        (MovedError("5461 10.0.0.2:6379"), SourceMisconfigured, "give the connection the extra cluster=true"),
    ],
)
def test_what_a_server_of_a_redis_cluster_says(error, raised, says):
    of_redis = RedisConnectionError if raised is ConnectionError else raised
    with pytest.raises(of_redis, match=says) as found, redis.refusals(redis.Source("own", "orders")):
        raise error
    assert isinstance(found.value, redis.LOST) is (raised is not SourceMisconfigured)


@pytest.mark.parametrize(
    ("code", "text", "passes"),
    [
        (
            KafkaError._AUTHENTICATION,
            "SASL mechanism handshake failed: Local: Broker transport failure",
            True,
        ),
        (KafkaError._AUTHENTICATION, "Failed to acquire SASL OAUTHBEARER token: Failed to connect to idp", True),
        (KafkaError._AUTHENTICATION, "SASL authentication error: [446c81dc]: Too many connects", True),
        (KafkaError._AUTHENTICATION, "SASL authentication error: Authentication failed", False),
        (KafkaError._SSL, "ssl3_read_bytes:tlsv1 alert internal error", True),
        (KafkaError._SSL, "certificate verify failed", False),
    ],
)
def test_what_passes_of_what_a_broker_says_to_a_login(code, text, passes):
    clients = kafka.Clients(kafka.Source("own", ("orders",), "etl"), {})
    with pytest.raises(kafka.BrokerUnavailable if passes else SourceMisconfigured), clients.refusals():
        raise KafkaException(KafkaError(code, text))
    clients._note(KafkaError(code, text))
    assert (clients.trouble is None) is passes


@pytest.mark.parametrize(
    "error", [KafkaException(KafkaError(KafkaError._TIMED_OUT)), SystemError("returned NULL without an exception")]
)
def test_whatever_the_client_makes_of_a_token_that_there_is_not_is_waited_out(error):
    """As its function fails while a client is made, which then says nothing."""

    def tokens(config):
        raise RuntimeError("nobody gives one")

    clients = kafka.Clients(kafka.Source("own", ("orders",), "etl"), {"oauth_cb": tokens})
    with pytest.raises(RuntimeError):
        clients._settings["oauth_cb"]("")
    with (
        pytest.raises(kafka.BrokerUnavailable, match="no token for the login: nobody gives one"),
        clients.refusals(),
    ):
        raise error


async def test_numbers_of_a_schema_registry_are_text_in_a_uri(monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_REGISTRY", "https://registry/?timeout=2.5&max.retries=2")
    settings = await schemas._settings("registry")
    assert (settings["timeout"], settings["max.retries"]) == (2.5, 2)
    assert settings["url"] == "https://registry"
    monkeypatch.setenv("AIRFLOW_CONN_REGISTRY", "http://registry/?timeout=soon")
    with pytest.raises(SourceMisconfigured, match="the extra timeout='soon', where a number is needed"):
        await schemas._settings("registry")


@pytest.mark.parametrize("extra", [{"credentials": ""}, {"credentials": "none of it"}, {"nkey_seed": "/a/path"}])
async def test_keys_for_nats_that_cannot_be_used_are_named(connect, tmp_path, extra):
    if "credentials" in extra:
        (tmp_path / "creds").write_text(extra["credentials"])
        extra = {"credentials": str(tmp_path / "creds")}

    async def greet(reader, writer):
        writer.write(b'INFO {"server_id":"x","nonce":"abc","auth_required":true,"max_payload":1000}\r\n')
        await reader.read(1000)
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        connect(conn_type="nats", host="127.0.0.1", port=port, extra=extra)
        with pytest.raises(SourceMisconfigured, match="'own' has credentials or an nkey seed that cannot be used"):
            await nats.connect("own")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("registry", "http://registry:8081"),
        ("registry/path", "http://registry:8081/path"),
        ("https://registry", "https://registry:8081"),
        ("https://registry:1/path", "https://registry:1/path"),
        ("::1", "http://[::1]:8081"),
        ("[::1]", "http://[::1]:8081"),
        ("a, https://b:1", "http://a:8081,https://b:1"),
    ],
)
async def test_the_address_of_a_schema_registry(monkeypatch, host, url):
    about = {"conn_type": "http", "host": host, "port": 8081}
    monkeypatch.setenv("AIRFLOW_CONN_REGISTRY", json.dumps(about))
    assert (await schemas._settings("registry"))["url"] == url


async def test_a_schema_registry_whose_address_is_none(monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_REGISTRY", json.dumps({"conn_type": "http", "host": "http://a:port"}))
    with pytest.raises(SourceMisconfigured, match="'registry' has a host that is no address"):
        await schemas._settings("registry")
