"""A real browser for the page: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any


def missing() -> str | None:
    """Say in one line what is missing for a browser, or return None."""
    if chromium() is None:
        return "no chromium on PATH (Debian: apt install chromium)"
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "no playwright (pip install playwright)"
    return None


def chromium() -> str | None:
    """Return where Chromium is, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Start Chromium, and end it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root, and containers, have no sandbox to give.
        started = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()


@contextlib.contextmanager
def logged_in(started: Any, url: str, token: str, *, theme: str = "light", width: int = 1440) -> Iterator[Any]:
    """Open a page of Airflow as who has ``token``, with everything that went wrong in it in ``page.problems``."""
    context = started.new_context(viewport={"width": width, "height": 900}, device_scale_factor=1)
    context.set_default_timeout(120_000)  # milliseconds; machines that do other things too
    context.add_init_script(f"localStorage.setItem('theme', '{theme}')")
    context.add_cookies([{"name": "_token", "value": token, "url": url}])
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    try:
        yield page
    finally:
        context.close()


def frame(page: Any) -> Any:
    """Return the part of Airflow's page that is the provider's."""
    return page.frame_locator("iframe")
