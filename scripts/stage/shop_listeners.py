"""A source for the pictures of the page, which is unreachable when its payment is to be committed."""

from __future__ import annotations

from airflow_events import EventListener


class LedgerListener(EventListener):
    """Takes payments from a ledger that cannot be reached when it matters."""

    async def poll_for_event(self, account, *, above=0):
        return {"account": account, "payment": "P-88213", "amount": 129.90, "currency": "EUR"}

    async def event_checkpointed(self, event):
        raise ConnectionError("ledger.internal:5432 refused the connection")
