#!/usr/bin/env python3
"""
Take the pictures of the page that the docs show: python3 scripts/screenshots.py.

It starts an Airflow of its own in .demo/, lets a small shop wait for this and that (scripts/stage/), and writes
docs/images/*.png with a real Chromium.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import bootstrap

HOME = bootstrap.ROOT / ".demo" / "screenshots"
DATA = Path(tempfile.gettempdir()) / "shop"  # the pictures show it
STAGE = bootstrap.ROOT / "scripts" / "stage"
IMAGES = bootstrap.ROOT / "docs" / "images"


def main() -> None:
    bootstrap.run_inside("[test]")
    import browser
    from deployment import Deployment
    from postgres import Postgres

    if problem := browser.missing():
        bootstrap.fail(problem)
    shutil.rmtree(HOME, ignore_errors=True)
    shutil.rmtree(DATA, ignore_errors=True)
    # The payments are to stay recorded and not committed for as long as this takes.
    settings = {"events.commit_timeout": "900", "events.directory_root": str(DATA)}
    with Postgres() as database, Deployment(HOME, database=database.url, settings=settings) as airflow:
        airflow.prepare()
        shutil.copy(STAGE / "shop_listeners.py", airflow.plugins)
        airflow.add_dags(STAGE / "shop.py")
        for folder in ("drops", "returns", "invoices", "rates/european-central-bank/daily/reference-rates"):
            (DATA / folder).mkdir(parents=True)
        airflow.start()
        airflow.wait_for_dags(
            "shop_orders", "shop_payments", "shop_refunds", "shop_reports", "shop_returns", "shop_invoices"
        )
        paid = play(airflow)
        with browser.browser() as chromium:
            for theme in ("light", "dark"):
                take(airflow, chromium, theme, paid)


def play(airflow):
    """Let the shop wait; return the run whose order has come."""
    from deployment import until

    done = [airflow.run("shop_orders", run_id=f"order-47{number}") for number in (11, 12)]
    for run in done:
        run.until_task("order_file", "deferred")
    for number in (11, 12):
        (DATA / "drops" / f"order-47{number}.json").write_text('{"items": 3}')
    for run in done:
        run.finished()
    waiting = [
        *(airflow.run("shop_orders", run_id=f"order-47{number}") for number in range(13, 15)),
        *(airflow.run("shop_refunds", {"refund": f"R-20{n}"}, run_id=f"refund-R-20{n}") for n in (41, 42)),
        airflow.run("shop_reports", run_id="monday-morning"),
        airflow.run("shop_payments", run_id="payment-88213"),
    ]
    for run in waiting:
        until(lambda run=run: "deferred" in {task["state"] for task in run.tasks().values()}, f"{run} waits")
    stuck = ("events", "list", "--stage", "recorded", "--dag-id", "shop_payments", "--output", "json")
    until(lambda: json.loads(airflow.airflow(*stuck)), "the payment is recorded")
    for number in range(1, 4):
        (DATA / "returns" / f"return-{number}.json").write_text("{}")
    listed = lambda: json.loads(airflow.airflow("events", "starts", "--output", "json"))  # noqa: E731
    until(lambda: {one["state"] for one in listed()} == {"open", "full"}, "one starts runs, one is full")
    return done[0]


def take(airflow, chromium, theme, paid):
    """Write the pictures of one color mode."""
    import browser

    airflow.api("GET", "/dags?limit=1")
    IMAGES.mkdir(exist_ok=True)
    with browser.logged_in(chromium, airflow.url, airflow._token, theme=theme) as page:
        inside = browser.frame(page)

        def picture(name):
            page.wait_for_timeout(800)  # the log, and what moves
            page.mouse.move(700, 5)
            path = IMAGES / f"{name}-{theme}.png"
            page.screenshot(path=path)
            print(path.relative_to(bootstrap.ROOT))

        page.goto(f"{airflow.url}/plugin/event-waits")
        inside.get_by_text("shop_payments").first.wait_for()
        picture("list")
        inside.locator("#tab-ended").click()
        inside.locator("td", has_text="order-4711").first.wait_for()
        picture("ended")
        inside.get_by_role("link", name="shop_orders").first.click()
        inside.locator("#event").wait_for()
        inside.locator(".log ol").wait_for()
        picture("wait")
        inside.locator("#back").click()
        inside.locator(".stuck a").first.click()
        inside.locator(".log ol").wait_for()
        picture("recorded")
        inside.locator("#back").click()
        inside.get_by_role("link", name="shop_refunds").first.click()
        inside.locator("#send").click()
        picture("send")
        page.goto(f"{airflow.url}/plugin/event-waits")
        inside.locator("#tab-starts").click()
        inside.locator("td", has_text="shop_returns").first.wait_for()
        picture("starts")
        page.goto(f"{paid.url}/tasks/order_file/plugin/event-wait")
        inside.locator(".log ol").wait_for()
        picture("tab")


if __name__ == "__main__":
    main()
