"""
moto's SQS as a process that can be killed: ``python sqs_server.py PORT FOLDER [CERTIFICATE KEY]``.

It keeps nothing on disk. The queues named in ``FOLDER/queues.json`` are there, empty, when it begins to answer.
What it deletes it adds to ``FOLDER/deleted.jsonl``, since SQS has no way to ask.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import wrapt
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.sqs.models import Queue, sqs_backends
from werkzeug.serving import run_simple

REGION = "eu-central-1"


def main(port: str, folder: str, *certificate_and_key: str) -> None:
    note_deletions(Path(folder, "deleted.jsonl"))
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


if __name__ == "__main__":
    main(*sys.argv[1:])
