"""The transactions of the inbox, in each database: who has an event, what is refused, what is answered twice."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timedelta, timezone

import pytest
from airflow.models.asset import AssetActive, AssetEvent, AssetModel
from airflow.models.dagrun import DagRun
from airflow.models.log import Log
from airflow.models.renderedtifields import RenderedTaskInstanceFields
from airflow.models.taskinstance import TaskInstance
from airflow.models.taskmap import TaskMap
from airflow.models.xcom import XComModel
from airflow_events.inbox import transactions
from airflow_events.inbox.entries import (
    Answer,
    Begin,
    End,
    Finish,
    Record,
    SetAside,
    Settle,
    Status,
    answer_of,
    as_json,
    entry_of,
)
from airflow_events.inbox.models import EventTaken
from sqlalchemy import func, insert, select

DONE = Status.DONE
ID = hashlib.sha256(b"orders/0/17").hexdigest()
CONTENT, OTHER = hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest()


def test_an_event_is_recorded_committed_and_delivered(waits):
    ti = waits.deferred(trigger_timeout=datetime.now(timezone.utc) + timedelta(hours=1))
    begun = waits.begin(ti, arguments=CONTENT, rendered={"listener_args": ["a"]})
    assert (begun.status, begun.generation, begun.stored, begun.deadline) == (DONE, 1, None, None)
    assert waits.row(ti).holder == "box:1"

    assert waits.record(ti, 1, '{"n": 1}', record_id="r").status == DONE
    assert (waits.row(ti).phase, waits.row(ti).event) == ("recorded", '{"n": 1}')
    assert waits.state(ti).trigger_timeout is None  # the event wins over the deadline
    assert waits.state(ti).state == "deferred"

    end = End(xcoms={"return_value": {"n": 1}})
    assert waits.finish(ti, 1, "r", end).status == DONE
    state = waits.state(ti)
    assert (state.state, state.trigger_id, state.next_method, state.next_kwargs) == ("success", None, None, None)
    assert state.end_date is not None and state.duration is not None
    assert waits.xcoms(ti) == {"return_value": {"n": 1}}
    row = waits.row(ti)
    assert row.phase == "committed" and None not in (row.committed_at, row.delivered_at)
    assert waits.session.scalars(select(Log.event).where(Log.dag_id == "shop")).all() == ["success"]
    assert waits.session.scalars(select(RenderedTaskInstanceFields.rendered_fields)).all() == [
        {"listener_args": ["a"]}
    ]


def test_what_has_nothing_to_commit_is_recorded_and_ended_at_once(waits):
    ti = waits.deferred()
    waits.begin(ti)
    end = End(xcoms={"return_value": 1}, dag_result=True, mapped_length=2)
    assert waits.record(ti, 1, "1", record_id="r", committed=True, end=end).status == DONE
    assert waits.state(ti).state == "success"
    assert waits.row(ti).phase == "committed"
    assert waits.session.scalars(select(TaskMap.length)).all() == [2]
    assert waits.session.scalars(select(XComModel.dag_result)).all() == [True]
    # Its answer was lost.
    assert waits.record(ti, 1, "1", record_id="r", committed=True, end=end).status == DONE
    assert waits.record(ti, 1, "2", record_id="s", committed=True, end=end).status == Status.OUTLIVED


@pytest.mark.parametrize("state", ["success", "failed", "scheduled", "running", None])
def test_a_task_that_is_not_deferred_takes_nothing(waits, state):
    ti = waits.deferred()
    waits.begin(ti)
    waits.set(ti, state=state)
    assert waits.record(ti, 1).status == Status.OUTLIVED
    assert waits.begin(ti).status == Status.OUTLIVED
    assert waits.finish(ti, 1).status == Status.OUTLIVED
    assert waits.row(ti).phase is None
    assert waits.state(ti).state == state


def test_an_outlived_try_is_refused(waits):
    first = waits.deferred()
    waits.begin(first)
    second = waits.again(first)
    assert waits.record(first, 1).status == Status.OUTLIVED
    assert waits.begin(second).generation == 2
    assert waits.record(second, 1).status == Status.OUTLIVED  # the generation is that of the try before


def test_of_two_triggerers_of_one_try_the_one_that_began_last_counts(waits):
    """The UUID of the try is the same for both: only the generation tells them apart."""
    ti = waits.deferred()
    assert [waits.begin(ti).generation, waits.begin(ti).generation] == [1, 2]
    assert waits.record(ti, 1).status == Status.OUTLIVED
    assert waits.record(ti, 2, record_id="r").status == DONE
    assert waits.finish(ti, 1, "r").status == Status.OUTLIVED
    assert waits.lose(ti, 1, "r").status == Status.OUTLIVED
    assert waits.row(ti).phase == "recorded"


def test_a_look_says_whether_the_wait_is_still_ones_own(waits):
    ti = waits.deferred()
    assert waits.look(ti, 1) == waits.look("nobody's", 1) == Status.OUTLIVED
    assert waits.look(ti, waits.begin(ti).generation) == DONE
    waits.begin(ti)
    assert (waits.look(ti, 1), waits.look(ti, 2)) == (Status.OUTLIVED, DONE)
    again = waits.again(ti)
    assert (waits.look(ti, 2), waits.look(again, 2)) == (Status.OUTLIVED, DONE)
    waits.set(again, state="failed")
    assert waits.look(again, 2) == Status.OUTLIVED


def test_whoever_begins_after_the_record_gets_it(waits):
    ti = waits.deferred()
    waits.begin(ti)
    waits.record(ti, 1, '"first"', record_id="r", after="x")
    begun = waits.begin(ti)
    assert (begun.stored.event, begun.stored.record_id, begun.stored.phase) == ('"first"', "r", "recorded")
    assert begun.stored.after == "x"
    assert waits.record(ti, 2, '"second"').status == Status.HAS
    assert waits.record(ti, 2, '"second"').stored.event == '"first"'
    assert waits.finish(ti, 2, None, End(state="skipped")).status == Status.HAS


def test_a_retry_and_a_clear_deliver_the_event_again(waits):
    ti = waits.deferred()
    waits.begin(ti)
    waits.record(ti, 1, '"mine"', record_id="r", committed=True, end=End())
    for cleared in (False, True):
        ti = waits.again(ti, cleared=cleared)
        begun = waits.begin(ti)
        assert begun.stored.event == '"mine"'
        assert waits.finish(ti, begun.generation, "r").status == DONE


def test_without_replay_a_clear_waits_for_another_and_a_retry_does_not(waits):
    ti = waits.deferred()
    waits.begin(ti, replay=False)
    waits.record(ti, 1, '"first"', record_id="r")
    ti = waits.again(ti)
    assert waits.begin(ti, replay=False).stored.event == '"first"'
    ti = waits.again(ti, cleared=True)
    begun = waits.begin(ti, replay=False)
    assert begun.stored is None
    assert (begun.superseded.event, begun.lost) == ('"first"', "r")  # it was not committed: to be given back
    assert waits.record(ti, begun.generation, '"second"').status == DONE


def test_what_an_earlier_life_returned_is_gone_where_no_worker_begins_the_next(waits):
    """A worker deletes it as it starts a try, and pushes what a pre_execute may have for it."""
    ti = waits.deferred()
    generation = waits.begin(ti, replay=False, rendered={}).generation
    waits.record(ti, generation, record_id="r", committed=True, end=End(xcoms={"return_value": {"a": 1}, "a": 1}))
    assert waits.xcoms(ti) == {"return_value": {"a": 1}, "a": 1}
    on_worker = waits.again(ti, cleared=True)
    waits.begin(on_worker, replay=False)
    assert waits.xcoms(on_worker).keys() == {"return_value", "a"}
    again = waits.again(on_worker, cleared=True)
    generation = waits.begin(again, replay=False, rendered={}).generation
    assert waits.xcoms(again) == {}
    assert waits.finish(again, generation, end=End("skipped")).status == Status.DONE
    assert waits.xcoms(again) == {}


def test_the_deadline_counts_from_the_first_try_and_again_from_a_clear(waits):
    ti = waits.deferred()
    first = waits.begin(ti, timeout=60.0).deadline
    assert waits.state(ti).trigger_timeout is not None
    assert waits.begin(waits.again(ti), timeout=60.0).deadline == first
    ti = waits.again(next(reversed(waits._keys)), cleared=True)
    assert datetime.fromisoformat(waits.begin(ti, timeout=60.0).deadline) > datetime.fromisoformat(first)


def test_the_start_of_the_run_stays_what_it_was_when_the_wait_first_began(waits):
    ti = waits.deferred()
    first = waits.begin(ti).run_start
    later = DagRun.__table__.update().values(start_date=datetime.now(timezone.utc))
    waits.session.execute(later)
    assert waits.begin(waits.again(ti, cleared=True)).run_start == first


def test_a_watch_looks_from_when_the_run_was_created_however_long_it_was_queued(waits):
    now, hours = datetime.now(timezone.utc), timedelta(hours=2)
    ti = waits.deferred(run_start=now)
    waits.session.execute(DagRun.__table__.update().values(created_at=now - hours))
    begun = waits.begin(ti, sought={"kind": "run", "of": {"dag_id": "d"}, "since": None, "after": 0.0})
    assert datetime.fromisoformat(begun.run_created) == now - hours
    assert datetime.fromisoformat(begun.run_start) == now
    assert waits.row(ti).sought_since.replace(tzinfo=timezone.utc) == now - hours


@pytest.mark.parametrize("made", [True, False])
def test_the_start_of_a_run_that_was_cleared_before_the_wait_first_began_is_when_it_was_made(waits, made):
    now, hour = datetime.now(timezone.utc), timedelta(hours=1)
    ti = waits.deferred(run_start=now)
    made_at = now - hour if made else None  # Airflow has noted it since 3.2
    changed = {"clear_number": 1, "created_at": made_at, "run_after": now - 2 * hour}
    waits.session.execute(DagRun.__table__.update().values(**changed))
    assert datetime.fromisoformat(waits.begin(ti).run_start) == (made_at or now - 2 * hour)


def test_a_lost_event_is_the_waits_no_longer(waits):
    ti = waits.deferred()
    waits.begin(ti)
    waits.record(ti, 1, record_id="r", identity=ID, content=CONTENT)
    assert waits.lose(ti, 1, "r") == Answer(DONE, lost="r")
    assert waits.lose(ti, 1, "r").status == DONE
    assert waits.row(ti).phase is None
    assert waits.begin(ti).lost == "r"
    assert waits.session.scalars(select(EventTaken)).all() == []


def test_an_event_is_recorded_for_one_wait_at_most(waits):
    """The unique key: what the source delivers again, nobody else gets."""
    one, other = waits.deferred(), waits.deferred()
    waits.begin(one), waits.begin(other)
    assert waits.record(one, 1, record_id="r", identity=ID, content=CONTENT).status == DONE
    answer = waits.record(other, 1, identity=ID, content=CONTENT)
    assert answer.status == Status.TAKEN
    assert answer.message == "shop/run_1/wait/-1"
    assert waits.row(other).phase is None
    assert waits.state(other).state == "deferred"


def test_one_batch_has_an_event_once_too(waits):
    one, other = waits.deferred(), waits.deferred()
    waits.begin(one), waits.begin(other)
    entries = [
        Record(ti, generation=1, record_id=ti[:30], event="1", identity=ID, content=CONTENT) for ti in (one, other)
    ]
    assert [answer.status for answer in transactions.record(waits.session, entries)] == [DONE, Status.TAKEN]


def test_the_same_id_with_another_content_is_a_new_event(waits, caplog):
    """A sequence that was begun again, an inode that is used again."""
    one, other, third = waits.deferred(), waits.deferred(), waits.deferred()
    for ti in (one, other, third):
        waits.begin(ti)
    waits.record(one, 1, record_id="r", identity=ID, content=CONTENT)
    assert waits.record(other, 1, record_id="s", identity=ID, content=OTHER).status == DONE
    assert "gives an id again, with another content" in caplog.text
    assert waits.record(third, 1, identity=ID, content=OTHER).status == Status.TAKEN
    # The first is as well known as before, until its source has confirmed that it has forgotten it.
    assert waits.record(third, 1, identity=ID, content=CONTENT).status == Status.TAKEN
    assert caplog.text.count("gives an id again") == 1
    assert acknowledged_ones(waits) == 0
    transactions.settle(waits.session, [Settle(third, identity=ID, content=OTHER)])
    assert acknowledged_ones(waits) == 1
    assert waits.record(third, 1, identity=ID, content=CONTENT).status == Status.TAKEN
    transactions.settle(waits.session, [Settle(third, identity=ID, content=CONTENT)])
    assert acknowledged_ones(waits) == 2


def acknowledged_ones(waits):
    moments = waits.session.scalars(select(EventTaken.acknowledged_at)).all()
    return sum(moment is not None for moment in moments)


def test_an_acknowledgement_is_noted_when_it_is_told(waits):
    ti = waits.deferred()
    waits.begin(ti)
    waits.record(ti, 1, record_id="r", identity=ID, content=CONTENT)
    assert waits.session.scalars(select(EventTaken.acknowledged_at)).all() == [None]
    waits.finish(ti, 1, "r")
    assert None not in waits.session.scalars(select(EventTaken.acknowledged_at)).all()


def test_what_is_acknowledged_later_stays_known_until_it_is(waits):
    """The source delivers it again; whoever acknowledges that says so."""
    ti, other = waits.deferred(), waits.deferred()
    waits.begin(ti), waits.begin(other)
    waits.record(ti, 1, record_id="r", identity=ID, content=CONTENT)
    [answer] = transactions.finish(waits.session, [Finish(ti, generation=1, record_id="r", acknowledged=False)])
    assert (answer.status, waits.row(ti).phase) == (DONE, "committed")
    assert waits.session.scalars(select(EventTaken.acknowledged_at)).all() == [None]
    assert waits.record(other, 1, identity=ID, content=CONTENT).status == Status.TAKEN
    for _ in range(2):
        assert transactions.settle(waits.session, [Settle(other, identity=ID)]) == [Answer(DONE)]
    assert None not in waits.session.scalars(select(EventTaken.acknowledged_at)).all()


def set_aside(waits, ti, generation=1):
    [answer] = transactions.set_aside(
        waits.session, [SetAside(ti, generation=generation, identity=ID, reason="no JSON")]
    )
    waits.session.expire_all()
    return answer


def test_for_an_event_that_cannot_be_read_one_try_fails(waits):
    one, other = waits.deferred(), waits.deferred()
    waits.begin(one), waits.begin(other)
    assert set_aside(waits, one).status == DONE
    assert set_aside(waits, one).status == DONE  # its answer was lost
    answer = set_aside(waits, other)
    assert (answer.status, answer.message) == (Status.TAKEN, "shop/run_1/wait/-1")
    again = waits.again(one)
    waits.begin(again)
    assert set_aside(waits, again, 2).status == Status.TAKEN  # its next try passes over it
    assert set_aside(waits, one).status == Status.OUTLIVED
    [taken] = waits.session.scalars(select(EventTaken))
    assert (taken.set_aside, taken.acknowledged_at) == ("no JSON", None)


def test_whoever_can_read_what_was_set_aside_gets_it(waits):
    one, other, third = waits.deferred(), waits.deferred(), waits.deferred()
    for ti in (one, other, third):
        waits.begin(ti)
    set_aside(waits, one)
    assert waits.record(other, 1, record_id="r", identity=ID, content=CONTENT).status == DONE
    assert waits.record(third, 1, record_id="s", identity=ID, content=CONTENT).status == Status.TAKEN
    assert waits.session.scalars(select(EventTaken.set_aside)).all() == [None]


def test_entries_are_answered_each_for_itself(waits):
    good, ended = waits.deferred(), waits.deferred()
    waits.set(ended, state="failed")
    answers = transactions.begin(waits.session, [Begin("no uuid"), Begin(good), Begin(ended)])
    assert [answer.status for answer in answers] == [Status.OUTLIVED, DONE, Status.OUTLIVED]
    assert "failed" in answers[2].message


def test_a_mapped_wait_whose_arguments_have_changed_does_not_get_the_event_of_others(waits):
    ti = waits.deferred(map_index=0)
    waits.begin(ti, arguments=CONTENT)
    waits.record(ti, 1, record_id="r")
    ti = waits.again(ti, cleared=True)
    assert waits.begin(ti, arguments=OTHER).status == Status.CHANGED
    assert waits.begin(ti, arguments=CONTENT).stored.record_id == "r"


def test_what_the_first_edition_recorded_is_taken_over(waits):
    ti = waits.deferred()
    told = {"phase": "recorded", "event": {"n": 1}, "id": "old", "recorded_at": "2026-11-23T12:00:00.000+00:00"}
    _, task_id, run_id, _ = waits._keys[ti]
    key = {"dag_id": "shop", "task_id": task_id, "run_id": run_id, "map_index": -1}
    stamp = {"dag_run_id": 1, "key": "event_record", "timestamp": datetime.now(timezone.utc)}
    waits.session.execute(insert(XComModel.__table__).values(**key, **stamp, value=told))
    begun = waits.begin(ti)
    assert (begun.stored.record_id, json.loads(begun.stored.event)) == ("old", {"n": 1})
    assert waits.finish(ti, begun.generation, "old").status == DONE


def test_places_of_a_list_have_events_of_their_own(waits):
    ti = waits.deferred()
    waits.begin(ti)
    assert waits.record(ti, 1, '"a"', record_id="r", place=0).status == DONE
    assert waits.record(ti, 1, '"b"', record_id="s", place=7).status == DONE
    assert waits.finish(ti, 1, "r", None, place=0).status == DONE  # committed, and the task goes on
    assert (waits.row(ti, 0).phase, waits.row(ti, 7).phase) == ("committed", "recorded")
    assert waits.state(ti).state == "deferred"
    assert waits.finish(ti, 1, None, End(xcoms={"return_value": ["a", "b"]})).status == DONE
    assert waits.state(ti).state == "success"


def test_entries_and_answers_survive_json():
    entry = Record(
        "t", 3, generation=4, record_id="r", event="1", end=End(xcoms={"k": [1]}, outlets=({"name": "a"},))
    )
    assert entry_of(json.loads(json.dumps(as_json(entry)))) == entry
    answer = Answer(Status.DONE.value, generation=3, lost="x")
    assert answer_of({**json.loads(json.dumps(as_json(answer))), "of_a_later_version": 1}) == answer
    with pytest.raises(ValueError, match="the operation is not one of begin, park, join, hosted, record"):
        entry_of({"operation": "drop"})
    with pytest.raises(ValueError, match="Begin has no colour"):
        entry_of({"operation": "begin", "ti": "t", "colour": 1})


def test_outlets_in_airflow_3_3_0(waits, monkeypatch):
    """There Airflow calls the listeners of asset events itself, and returns nothing to be called."""
    register = TaskInstance.register_asset_changes_in_db
    monkeypatch.setattr(
        TaskInstance, "register_asset_changes_in_db", lambda *args, **kwargs: (register(*args, **kwargs), None)[1]
    )
    ti = waits.deferred()
    waits.begin(ti)
    outlets = ({"name": "a", "uri": "a", "type": "AssetNameRef"},)
    [answer] = transactions.record(
        waits.session,
        [Record(ti, generation=1, record_id="r", event="1", committed=True, end=End(outlets=outlets))],
    )
    assert answer.status is DONE
    assert waits.state(ti).state == "success"


@pytest.mark.parametrize(
    ("outlet", "said"),
    [
        ({"nonsense": 1}, "nonsense"),
        # Another DAG has its name, say. Airflow refuses it before it runs a task; to register it, it only warns.
        ({"name": "dead", "uri": "dead", "type": "Asset"}, "the task has inactive assets as outlets: dead"),
    ],
    ids=["none", "inactive"],
)
def test_one_bad_outlet_harms_its_own_task_alone(waits, monkeypatch, outlet, said):
    """Airflow may refuse to register an asset's change, and would take the whole batch with it."""
    for name in ("live", "dead"):
        waits.session.add(AssetModel(name=name, uri=name))
    waits.session.flush()
    waits.session.add(AssetActive(name="live", uri="live"))
    waits.session.flush()

    def in_transaction(work):
        with waits.session.begin_nested():
            return work(waits.session)

    monkeypatch.setattr(transactions, "in_transaction", in_transaction)
    good, bad, plain = waits.deferred(), waits.deferred(), waits.deferred()
    for ti in (good, bad, plain):
        waits.begin(ti)
    outlets = {good: ({"name": "live", "uri": "live", "type": "Asset"},), bad: (outlet,), plain: ()}
    entries = [
        Record(ti, generation=1, record_id=ti[:30], event="1", committed=True, end=End(outlets=outlets[ti]))
        for ti in (good, bad, plain)
    ]
    answers = transactions.carry_out(entries)
    assert [answer.status for answer in answers] == [DONE, Status.INVALID, DONE]
    assert said in answers[1].message
    assert waits.session.scalar(select(func.count()).select_from(AssetEvent)) == 1
    assert [waits.state(ti).state for ti in (good, bad, plain)] == ["success", "deferred", "success"]
    assert waits.row(bad).phase is None
