"""
moto's SQS as a process that can be killed: ``python sqs_server.py PORT FOLDER [CERTIFICATE KEY]``.

It keeps nothing on disk. The queues named in ``FOLDER/queues.json`` are there, empty, when it begins to answer.
What it deletes it adds to ``FOLDER/deleted.jsonl``, since SQS has no way to ask.
moto serves each request on a thread of its own, and its queues are not made for that: of two deletions at once one
can be undone by the other, and two receives at once can bring the same message. So one request after another has
the queues here, as long as it does not wait for a message.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import wrapt
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.sqs.models import Queue, SQSBackend, sqs_backends
from werkzeug.serving import run_simple

REGION = "eu-central-1"


def main(port: str, folder: str, *certificate_and_key: str) -> None:
    note_deletions(Path(folder, "deleted.jsonl"))
    one_after_another()
    queues = Path(folder, "queues.json")
    if queues.exists():
        for name, attributes in json.loads(queues.read_text()).items():
            sqs_backends[DEFAULT_ACCOUNT_ID][REGION].create_queue(name, **attributes)
    run_simple(
        "127.0.0.1",
        int(port),
        DomainDispatcherApplication(create_backend_app),
        threaded=True,
        ssl_context=certificate_and_key or None,
        request_handler=MotoRequestHandler,
    )


def note_deletions(notes: Path) -> None:
    def delete(wrapped: Any, queue: Queue, args: tuple[str], kwargs: dict[str, str]) -> None:
        [receipt] = [*args, *kwargs.values()]
        there = [message.body for message in queue._messages if message.had_receipt_handle(receipt)]
        wrapped(receipt)
        with notes.open("a") as file:
            for body in there:
                file.write(json.dumps({"queue": queue.name, "body": body}) + "\n")

    wrapt.wrap_function_wrapper(Queue, "delete_message", delete)


def one_after_another() -> None:
    held = threading.Lock()

    def hold(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        with held:
            return wrapped(*args, **kwargs)

    def let_go(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        held.release()
        try:
            return wrapped(*args, **kwargs)
        finally:
            held.acquire()

    for name in ("receive_message", "send_message", "delete_message", "change_message_visibility"):
        wrapt.wrap_function_wrapper(SQSBackend, name, hold)
    wrapt.wrap_function_wrapper(Queue, "wait_for_messages", let_go)


if __name__ == "__main__":
    main(*sys.argv[1:])
