"""What an API server does besides answering."""

from __future__ import annotations

import asyncio

from airflow_events.api import matcher


async def test_what_an_api_server_cannot_do_is_in_its_log(monkeypatch, caplog):
    """Else no kept event would reach a wait that begins, and nobody would know why."""

    async def nothing():
        pass

    async def broken():
        raise ValueError("no such pool")

    for module, name in (
        (matcher.hosting, "keep_hosts"),
        (matcher.seeking, "keep_looking"),
        (matcher.gauges, "keep_telling"),
        (matcher.upkeep, "keep_up"),
    ):
        monkeypatch.setattr(module, name, nothing)
    monkeypatch.setattr(matcher.waking, "keep_waking", broken)

    async def app(scope, receive, send):
        await receive()
        await asyncio.sleep(0.01)

    async def started():
        return {"type": "lifespan.startup"}

    await matcher.Matcher(app)({"type": "lifespan"}, started, None)
    assert "does not see to all waits: no such pool" in caplog.text
