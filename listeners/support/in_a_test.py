"""Where an event over HTTP is sent to in ``dag.test()``, which has no API server."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from airflow_events.listeners.support import serde

log = logging.getLogger(__name__)


async def event_over_http(misfit: Callable[[Any], str | None]) -> Any:
    """
    Return the first event that is posted to a port of this machine, which the output names.

    :param misfit: says why an event is not taken; None takes it.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[Any] = loop.create_future()

    def give(event: Any) -> None:
        if not found.done():
            found.set_result(event)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                event = serde.check(json.loads(body.decode("utf-8-sig")))
                problem = misfit(event)
            except (ValueError, TypeError) as error:
                problem = str(error)
            self.send_response(422 if problem else 200)
            self.end_headers()
            self.wfile.write(f"{problem or 'delivered'}\n".encode())
            if not problem:
                loop.call_soon_threadsafe(give, event)

        def log_message(self, *_: Any) -> None:
            """Leave the output to the DAG."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        log.info(
            "There is no API server in dag.test(). Send the event here: curl -X POST http://127.0.0.1:%d/ -d '{}'",
            server.server_port,
        )
        try:
            return await found
        finally:
            server.shutdown()
