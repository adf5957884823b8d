"""Who is sent metrics: a socket that keeps what StatsD clients send to it."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """
    One metric as it was sent.

    :param kind: ``c`` a counter, ``g`` a gauge, ``ms`` a timer in milliseconds.
    """

    name: str
    tags: dict[str, str]
    value: float
    kind: str


class Receiver:
    """A StatsD server on 127.0.0.1, which ends when its context does."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        # A whole Airflow sends here, and not only when somebody reads.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self._received: list[Metric] = []
        self._thread = threading.Thread(target=self._receive, daemon=True)

    @property
    def settings(self) -> dict[str, str]:
        """What an Airflow needs to send here, with tags as InfluxDB's Telegraf reads them."""
        return {
            "metrics.statsd_on": "True",
            "metrics.statsd_host": "127.0.0.1",
            "metrics.statsd_port": str(self.port),
            "metrics.statsd_prefix": "airflow",
            "metrics.statsd_influxdb_enabled": "True",
        }

    def of(self, name: str, **tags: str) -> list[Metric]:
        """Return what was received under a name, and with these tags among others, so far."""
        return [
            metric
            for metric in list(self._received)
            if metric.name == f"airflow.{name}" and tags.items() <= metric.tags.items()
        ]

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)

    def _receive(self) -> None:
        while True:
            try:
                packet = self._socket.recv(65536)
            except OSError:
                return
            if not packet:
                return
            self._received.extend(_read(packet.decode()))


def _read(packet: str) -> Iterator[Metric]:
    for line in packet.splitlines():
        if found := re.fullmatch(r"([^:,|]+)((?:,[^:|]+?)?):([-+0-9.eE]+)\|(\w+)(\|.*)?", line):
            tags = dict(tag.split("=", 1) for tag in found[2].split(",") if tag)
            yield Metric(found[1], tags, float(found[3]), found[4])
