from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone

import pendulum
import pytest
from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.support import clock as clocks
from airflow_events.listeners.support import serde
from airflow_events.listeners.support.clock import Clock
from airflow_events.listeners.timer import TimerListener, when

START = datetime(2026, 5, 1, 8, tzinfo=timezone.utc)
WAIT = Wait("dag", "run", "task", run_start=START, timezone="Europe/Berlin")


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (0, datetime(1970, 1, 1)),
        (1.5, datetime(1970, 1, 1, 0, 0, 1, 500000)),
        ("1767225600", datetime(2026, 1, 1)),
        (datetime(2026, 1, 1, 12), datetime(2026, 1, 1, 11)),  # naive: Berlin
        (datetime(2026, 7, 1, 12), datetime(2026, 7, 1, 10)),  # in summer time
        (pendulum.datetime(2026, 1, 1, 12, tz="Asia/Tokyo"), datetime(2026, 1, 1, 3)),
        ("2026-01-01T12:00:00Z", datetime(2026, 1, 1, 12)),
        ("2026-01-01 12:00:00+02:00", datetime(2026, 1, 1, 10)),
        ("2026-01-01", datetime(2025, 12, 31, 23)),
        (timedelta(minutes=5), datetime(2026, 5, 1, 8, 5)),
        ("PT15M", datetime(2026, 5, 1, 8, 15)),
        ("P1W", datetime(2026, 5, 8, 8)),
        (timedelta(minutes=-5), datetime(2026, 5, 1, 7, 55)),
    ],
)
def test_what_a_moment_means(moment, expected):
    due = when(moment, WAIT)
    assert due == expected.replace(tzinfo=timezone.utc)
    assert due.utcoffset() == timedelta()
    assert type(due) is datetime


@pytest.mark.parametrize(
    ("moment", "error", "message"),
    [
        ("tomorrow", ValueError, "'tomorrow' is neither ISO 8601"),
        ("08:00", ValueError, "needs a moment or a duration"),
        ("now", ValueError, "'now' is neither ISO 8601"),
        ("P1M", ValueError, "'P1M' has years or months, which are not always as long"),
        ("P1Y2D", ValueError, "'P1Y2D' has years or months"),
        ("2026-03-29/2026-03-30", ValueError, "is a interval, and a timer needs a moment"),
        (1e15, ValueError, "out of range"),
        (timedelta.max, ValueError, "after the start of the run is out of range"),
        (None, TypeError, "not None of type NoneType"),
        (True, TypeError, "of type bool"),
        ({"at": 1}, TypeError, "of type dict"),
    ],
)
def test_what_is_no_moment_is_named(moment, error, message):
    with pytest.raises(error, match=message):
        when(moment, WAIT)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ((2026, 10, 25, 2, 30), datetime(2026, 10, 25, 1, 30, tzinfo=timezone.utc)),  # the clock shows it twice
        ((2026, 3, 29, 2, 30), datetime(2026, 3, 29, 1, 30, tzinfo=timezone.utc)),  # and this never
    ],
)
def test_a_change_of_the_clock_has_one_rule(written, expected):
    moments = [datetime(*written), datetime(*written, fold=1), pendulum.naive(*written)]
    texts = [datetime(*written).isoformat()]
    localized = [serde.localized(moment, WAIT.tz) for moment in moments]
    assert {when(moment, WAIT) for moment in (*moments, *texts, *localized)} == {expected}


def test_a_dag_may_be_in_a_zone_without_a_name():
    zone = pendulum.timezone(2 * 3600)
    wait = Wait("dag", "run", "task", timezone=zone.name)
    assert when("2026-01-01T12:00", wait) == datetime(2026, 1, 1, 10, tzinfo=timezone.utc)


def test_a_duration_needs_a_start_of_the_run():
    with pytest.raises(ValueError, match="counts from the start of the run, and dag/run/task/-1 has none"):
        when("PT1S", Wait("dag", "run", "task"))


async def test_a_moment_in_the_past_returns_at_once():
    with working_for(WAIT):
        assert await asyncio.wait_for(TimerListener().poll_for_event(60), 1) == datetime(
            1970, 1, 1, 0, 1, tzinfo=timezone.utc
        )


async def test_a_timer_returns_at_its_moment_and_not_before():
    due = datetime.now(timezone.utc) + timedelta(seconds=0.3)
    with working_for(WAIT):
        assert await TimerListener().poll_for_event(due) == due
    assert datetime.now(timezone.utc) >= due


async def test_many_timers_have_one_heap_and_one_call_of_the_loop(monkeypatch):
    loop, clock, now = asyncio.get_running_loop(), Clock.of_loop(), 1000.0
    monkeypatch.setattr(clocks, "_now", lambda: now)
    begun = len(loop._scheduled)
    order = []

    async def wait(number):
        await clock.until(datetime.fromtimestamp(1001 + number % 7, timezone.utc))
        order.append(number % 7)

    tasks = [asyncio.create_task(wait(number)) for number in range(1000)]
    await asyncio.sleep(0)
    assert len(clock) == 1000
    assert len([call for call in loop._scheduled if not call.cancelled()]) - begun == 1
    now = 1003.5
    clock._go_off()
    while len(order) < len([number for number in range(1000) if number % 7 <= 2]):
        await asyncio.sleep(0)
    assert order == sorted(order)
    assert not any(task.done() for number, task in enumerate(tasks) if number % 7 > 2)
    now = 2000.0
    clock._go_off()
    await asyncio.gather(*tasks)
    assert len(clock) == 0


async def test_timers_that_are_cancelled_leave_the_heap():
    clock = Clock.of_loop()
    later = datetime.now(timezone.utc) + timedelta(hours=1)
    tasks = [asyncio.ensure_future(clock.until(later + timedelta(seconds=number))) for number in range(100)]
    await asyncio.sleep(0)
    for task in tasks[:99]:
        task.cancel()
    await asyncio.wait(tasks[:99])
    assert len(clock) == 1
    assert len(clock._heap) <= 2
    tasks[99].cancel()
    await asyncio.wait(tasks)
    assert (len(clock), clock._heap, clock._call) == (0, [], None)
