"""
Requests that nobody would make on purpose, to all routes of an API server in this process.

Once as the description of the routes has them, and not (schemathesis), and once with bodies from a grammar of JSON
as it should not be. Whatever comes, it is answered, and not by 500; and what is accepted can be read back.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import uuid

import schemathesis
from airflow.api_fastapi.execution_api.datamodels.xcom import XComResponse
from airflow.models.xcom import XComModel
from airflow.sdk.api.datamodels._generated import XComResponse as AsAWorkerReadsIt
from airflow_events import inbox_token
from airflow_events.api.callback import sign
from examples import of_examples
from hypothesis import given
from hypothesis import strategies as st
from in_process import ROUTES
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks
from sqlalchemy import select

JUDGED_BY = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
SECRET = b"a secret"

_SPACE = st.sampled_from(["", "", " ", "\n", "\t", "\ufeff", "\0", "/**/"])
_NUMBERS = st.sampled_from(
    ["0", "-0", "1", "01", "1.", ".5", "-0.0", "1e5", "1E+2", "1e400", "-1e400", "1e-400", "0x1", "+1", "1_0",
     "NaN", "Infinity", "-Infinity", "9007199254740993", "9223372036854775808", "18446744073709551616", "9" * 400,
     "9" * 5000, "0.1" + "0" * 400 + "1", "--1", "٣"]
)  # fmt: skip
_STRINGS = st.one_of(
    st.sampled_from(
        ['""', '"a"', '"\\u0000"', '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83c\\udf89"', '"🎉"', '"\x01"',
         '"\\x41"', '"\\u12"', "'a'", '"a', '"\\', '"\u2028"', '"__type"', '"reason"',
         '"entries"', '"order"', '"' + "x" * 3000 + '"']
    ),
    st.text(max_size=8).map(json.dumps),
    st.text(st.characters(codec=None, categories=None), max_size=8).map(lambda text: f'"{text}"'),
)  # fmt: skip
_KEYS = st.one_of(
    _STRINGS, st.sampled_from(['"__classname__"', '"__var"', '"__data__"', '"__version__"', "a", "1", "null"])
)
_LEAVES = st.one_of(_NUMBERS, _STRINGS, st.sampled_from(["null", "true", "false", "True", "nul", "", "undefined"]))


def _inner(children):
    item = st.tuples(_SPACE, children, _SPACE).map("".join)
    pair = st.tuples(_KEYS, st.sampled_from([":", ":", ":", "=", "", "::"]), item).map("".join)
    comma = st.sampled_from([",", ",", ",", ",,", " ", ",\n"])
    return st.one_of(
        st.tuples(comma, st.lists(item, max_size=4)).map(lambda made: f"[{made[0].join(made[1])}]"),
        st.tuples(comma, st.lists(pair, max_size=4)).map(lambda made: f"{{{made[0].join(made[1])}}}"),
        st.tuples(children, st.sampled_from([90, 94, 95, 96, 300, 5000])).map(
            lambda made: "[" * made[1] + made[0] + "]" * made[1]
        ),
    )


def _encoded(made):
    text, codec = made
    return text.encode(codec, "surrogatepass" if codec.startswith("utf") else "replace")


TEXTS = st.recursive(_LEAVES, _inner, max_leaves=8)
BODIES = st.one_of(
    st.tuples(TEXTS, st.sampled_from(["utf-8"] * 8 + ["utf-16", "utf-32", "latin-1"])).map(_encoded),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
        lambda children: st.one_of(st.lists(children), st.dictionaries(st.text(), children)),
    ).map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=20),
)
HEADERS = st.fixed_dictionaries(
    {
        "Content-Type": st.sampled_from(
            ["application/json"] * 8 + ["application/ld+json; charset=x", "text/plain", ""]
        )
    },
    optional={
        "Idempotency-Key": st.sampled_from(
            ["", "k", "x" * 200, "x" * 201, "\x7f", "é".encode().decode("latin-1")]
        ),
        "Content-Encoding": st.sampled_from(["gzip", "identity", "x"]),
        "Content-Length": st.sampled_from(["0", "1", "x"]),
        "X-GitHub-Event": st.sampled_from(["push", "ping", ""]),
        "Accept": st.sampled_from(["text/html", "x"]),
    },
)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "to": st.sampled_from(["one", "all", "", "two"]),
        "ttl": st.sampled_from(["1", "0", "-1", "nan", "inf", "1e300", "x", "315360000"]),
        "map_index": st.sampled_from(["-1", "0", "2147483648", "x", "1e3"]),
        "limit": st.sampled_from(["1", "200", "201", "x"]),
        "offset": st.sampled_from(["0", "10000000", "99999999999999999999"]),
        "text": st.sampled_from(["%", "_", "\\", "x\0", "'", "é"]),
        "order": st.sampled_from(["since", "x"]),
        "unknown": st.just("x"),
    },
)


def as_described(server, method, path, *, examples, repeatable=True):
    """Make requests that keep to a route's description, and such that do not, and judge the answers by it."""
    headers = {"Authorization": f"Bearer {server.token('ADMIN')}"}
    described = schemathesis.openapi.from_asgi("/events/openapi.json", server.root, headers=headers)
    wait = _wait(server)
    names = {"dag_id": wait.dag_id, "run_id": wait.run_id, "task_id": wait.task_id, "map_index": -1}
    for mode in GenerationMode:
        strategy = described[path][method.lower()].as_strategy(generation_mode=mode)

        @of_examples(examples, repeatable=repeatable)
        @given(case=strategy, is_of_wait=st.booleans())
        def check(case, is_of_wait):
            if is_of_wait and case.path_parameters:
                case.path_parameters = {**case.path_parameters, **{k: v for k, v in names.items() if k in path}}
            case.call_and_validate(headers=headers, checks=JUDGED_BY)

        check()


def with_any_body(server, method, path, *, examples, repeatable=True):
    """Make requests with bodies, headers and parameters of a grammar; what is accepted has to come back."""
    client, admin = server.client(), {"Authorization": f"Bearer {server.token('ADMIN')}"}
    server.webhook("conn")
    inbox = {"Authorization": f"Bearer {inbox_token.sign()}"}

    @of_examples(examples, repeatable=repeatable)
    @given(body=BODIES, headers=HEADERS, parameters=PARAMETERS)
    def check(body, headers, parameters):
        wait = _wait(server)
        names = {
            "dag_id": wait.dag_id, "run_id": wait.run_id, "task_id": wait.task_id, "map_index": -1,
            "key": server.waits.keys[wait][0], "conn_id": "conn", "name": "page.js",
            "ti": server.waits.state(wait).id,
        }  # fmt: skip
        mac = hmac.new(SECRET, body, hashlib.sha256).hexdigest()
        token = {"token": sign(wait, 60)} if path == "/callback" else {}
        headers = {**headers, **(inbox if path == "/inbox" else admin), "X-Hub-Signature-256": f"sha256={mac}"}
        answer = client.request(
            method,
            f"/events{path.replace(':path', '').format(**names)}",
            content=None if method == "GET" else body,
            headers={name: value.encode("latin-1") for name, value in headers.items()},
            params={**parameters, **token},
        )
        assert answer.status_code < 500, f"{method} {path} {headers} {parameters} {body[:300]!r}: {answer.text}"
        if answer.status_code == 200 and path != "/inbox" and method == "POST":
            _comes_back(server, client, admin, wait, body)

    check()


def _wait(server):
    """A wait that anybody may send anything to."""
    wait = server.waits.add(uuid.uuid4().hex)
    server.session.commit()
    return wait


def _comes_back(server, client, admin, wait, body):
    """A worker downstream can read what the wait returned, if it did, and the page can show it."""
    shown = client.get(f"/events/api/waits/{wait.dag_id}/{wait.run_id}/{wait.task_id}/-1", headers=admin)
    assert shown.status_code == 200, f"{body[:300]!r} cannot be shown: {shown.text}"
    where = (XComModel.run_id == wait.run_id, XComModel.task_id == wait.task_id)
    stored = server.session.scalars(select(XComModel).where(*where, XComModel.key == "return_value")).one_or_none()
    if stored is not None:
        sent = XComResponse(key="return_value", value=stored.value).model_dump_json()
        assert AsAWorkerReadsIt.model_validate_json(sent).value == json.loads(body)
    server.session.rollback()


_NOT_DESCRIBED = ("/inbox", "/openapi", "/tasks")
DESCRIBED = [(method, path.replace(":path", "")) for method, path in ROUTES if not path.startswith(_NOT_DESCRIBED)]
