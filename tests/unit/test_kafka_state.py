"""
What Kafka's ledger keeps, over thousands of schedules: waits that claim, commit, give back and are too late,
claims that lapse, offsets that somebody sets; and that the model sees what it should: mutants are caught.
"""

from __future__ import annotations

import pytest

pytest.importorskip("confluent_kafka")

from airflow_events.listeners.kafka import consume, state
from airflow_events.listeners.kafka.state import RELEASED, Claim, Partition, State
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

PARTITIONS = 3
waits = st.integers(0, 5).map("dag/run{}/task/-1".format)
pick = st.integers(0, 99)


class Queue(RuleBasedStateMachine):
    """
    A topic with holes, its group, and processes that write one after the other, as the ledger sees to.

    What is true is kept beside the state, message by message: ``holder`` and ``committed``.
    """

    hand_out = staticmethod(consume._claim)

    @initialize(start=st.integers(0, 3))
    def begin(self, start):
        self.messages = [[] for _ in range(PARTITIONS)]
        self.end = [start] * PARTITIONS
        self.begun = [start] * PARTITIONS
        self.state = State({number: Partition(start) for number in range(PARTITIONS)})
        self.now = 1000.0
        self.holder = {}
        self.committed = set()
        self.log = []  # of states, as the compacted topic has them

    @rule(partition=st.integers(0, PARTITIONS - 1), holes=st.integers(0, 2))
    def send(self, partition, holes):
        """Where there are holes, a transaction ended, or the topic was compacted."""
        self.messages[partition].append(self.end[partition] + holes)
        self.end[partition] += holes + 1

    @rule(wanted=st.lists(waits, min_size=1, max_size=4, unique=True), lapse=st.sampled_from([1, 60]), late=pick)
    def claim(self, wanted, lapse, late):
        """Some have read less than others have claimed meanwhile."""
        starts = {n: p.next if late % 2 else max(p.next - 3, 0) for n, p in self.state.partitions.items()}
        heads = [(n, o) for n, offsets in enumerate(self.messages) for o in offsets if o >= starts[n]]
        changed = self.state.copy()
        found = self.hand_out(changed, dict.fromkeys(wanted, lapse), heads, starts, self.now, mark=7)
        for wait, (partition, offset, claim) in found.items():
            assert offset in self.messages[partition], "there is no such message"
            assert (partition, offset) not in self.committed, "it was committed"
            held, until = self.holder.get((partition, offset), (None, 0))
            assert held in (None, wait) or until < self.now, "another wait has it"
            if held == wait:
                assert claim.until >= self.now, "it may be taken away at once"
            mine = [
                place for place, (who, _) in self.holder.items() if who == wait and place != (partition, offset)
            ]
            assert not mine, f"the wait has {mine} already"
            self.holder[partition, offset] = wait, claim.until
        held = {place for place, (who, until) in self.holder.items() if until >= self.now or who in wanted}
        free = self.uncommitted() - held
        assert len(found) == len(wanted) or not free, f"{free} are free, and {found} were given"
        self.write(changed)

    @precondition(lambda self: self.holder)
    @rule(number=pick, wait=st.none() | waits)
    def commit(self, number, wait):
        """A wait commits what it has, or had; or a wait of ours commits what another has."""
        place = list(self.holder)[number % len(self.holder)]
        holder, _ = self.holder[place]
        who = wait or holder
        changed = self.state.copy()
        assert changed.holder(*place) == holder
        if who == holder:
            changed.commit(*place)
            assert changed.commits == [(*place, who)]
            self.committed.add(place)
            del self.holder[place]
            self.write(changed)

    @rule(wait=waits)
    def release(self, wait):
        changed = self.state.copy()
        changed.release(wait)
        self.holder = {
            place: (RELEASED, 0) if who == wait else (who, until) for place, (who, until) in self.holder.items()
        }
        self.write(changed)

    @rule(seconds=st.sampled_from([0.5, 2, 100]))
    def time_goes_by(self, seconds):
        self.now += seconds

    @rule(partition=st.integers(0, PARTITIONS - 1), back=st.integers(0, 4))
    def somebody_sets_the_offset(self, partition, back):
        """Back, so that messages come again; or ahead, so that some are passed over."""
        offset = max(self.state.partitions[partition].watermark + 2 - back, self.begun[partition])
        offset = min(offset, self.end[partition])
        changed = self.state.copy()
        ahead = offset > changed.partitions[partition].watermark
        changed.begin(partition, offset)
        for place in list(self.holder):
            if place[0] == partition and (place[1] < offset or not ahead):
                del self.holder[place]
        self.committed = {
            place for place in self.committed if place[0] != partition or (ahead or place[1] < offset)
        } | {(partition, o) for o in self.messages[partition] if o < offset}
        self.write(changed)

    def write(self, changed):
        self.state = changed
        if changed.changed:
            self.log.append(("group/topic", changed.encode()))
            self.log.append(("other/topic", State({0: Partition(len(self.log))}).encode()))
            self.state = State.decode(changed.encode())

    def uncommitted(self):
        sent = {(n, o) for n, offsets in enumerate(self.messages) for o in offsets if o >= self.begun[n]}
        return sent - self.committed

    @invariant()
    def the_watermark_is_above_no_message_that_is_not_acknowledged(self):
        if hasattr(self, "state"):
            for number, partition in self.state.partitions.items():
                open_ones = [o for n, o in self.uncommitted() if n == number]
                assert partition.watermark <= min(open_ones, default=self.end[number])

    @invariant()
    def what_is_claimed_is_what_is_true(self):
        if hasattr(self, "state"):
            assert {(n, o): claim.wait for n, o, claim in self.state.claims()} == {
                place: who for place, (who, _) in self.holder.items()
            }

    @invariant()
    def all_that_counts_is_left_when_the_log_of_states_is_compacted(self):
        if getattr(self, "log", None):
            left = dict(self.log)
            assert State.decode(left["group/topic"]).partitions == self.state.partitions


MODEL = settings(
    max_examples=300, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)  # fmt: skip
MUTANT = settings(MODEL, max_examples=1000, phases=[Phase.generate], derandomize=True)


def test_each_message_has_one_holder_and_the_watermark_is_below_all_that_are_open():
    run_state_machine_as_test(Queue, settings=MODEL)


def the_highest(self):
    """A watermark that goes with the last commit, as an ordinary consumer's does."""
    return max(self.open, default=self.next)


def commit_in_order(self, partition, offset):
    """A commit that takes all below it along, as Kafka's own does."""
    claims = self.partitions[partition].open
    claim = claims.pop(offset)
    for other in [other for other in claims if other < offset]:
        del claims[other]
    self.commits.append((partition, offset, claim.wait))
    self.changed = True


def claim_without_a_note(self, partition, offset, claim):
    """A claim that leaves the message to whoever comes next."""
    self.partitions[partition].open[offset] = claim
    self.changed = True
    return True


def forget_what_was_released(self, wait):
    """A release that drops the message with the claim."""
    for number, offset, claim in list(self.claims()):
        if claim.wait == wait:
            del self.partitions[number].open[offset]
            self.changed = True


def encode_the_changes(self):
    """A log of changes rather than of states, which compaction would tear."""
    few = State({n: p for n, p in self.partitions.items() if p.open})
    return real_encode(few)


real_encode = State.encode


@pytest.mark.parametrize(
    ("where", "name", "mutant"),
    [
        (Partition, "watermark", property(the_highest)),
        (State, "commit", commit_in_order),
        (State, "claim", claim_without_a_note),
        (State, "release", forget_what_was_released),
        (State, "encode", encode_the_changes),
    ],
)
def test_a_mutant_is_caught(monkeypatch, where, name, mutant):
    monkeypatch.setattr(where, name, mutant)
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(Queue, settings=MUTANT)


def the_newest_first(state, wanted, heads, starts, now, mark):
    """What lies before the message that is given out is passed over for good."""
    return consume._claim(state, wanted, heads[::-1], starts, now, mark)


def whether_it_lapsed_or_not(state, wanted, heads, starts, now, mark):
    return consume._claim(state, wanted, heads, starts, now + 1000, mark)


def what_was_read_too_late(state, wanted, heads, starts, now, mark):
    """What lies between the state and what was read is passed over."""
    return consume._claim(state, wanted, heads[1:], starts, now, mark)


@pytest.mark.parametrize("mutant", [the_newest_first, whether_it_lapsed_or_not, what_was_read_too_late])
def test_a_mutant_of_the_order_is_caught(mutant):
    class Mutant(Queue):
        hand_out = staticmethod(mutant)

    with pytest.raises(AssertionError):
        run_state_machine_as_test(Mutant, settings=MUTANT)


# Of the form that is written.

QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
texts = st.text(max_size=20)
claims = st.builds(Claim, wait=texts | st.just(RELEASED), until=st.floats(0, 1e11), mark=st.integers(0, 2**62))
partitions = st.dictionaries(
    st.integers(0, 1000),
    st.builds(
        Partition, next=st.integers(0, 2**62), open=st.dictionaries(st.integers(0, 2**62), claims, max_size=5)
    ),
    max_size=5,
)


@QUICK
@given(partitions)
def test_what_is_written_is_read_again(partitions):
    written = State(partitions).encode()
    again = State.decode(written)
    assert again.partitions == partitions
    assert again.encode() == written
    assert not again.changed


@QUICK
@given(st.binary() | st.sampled_from([b"{}", b"[]", b"null", b'{"version":1}', b'{"version":2,"partitions":{}}']))
def test_what_is_something_else_is_refused(raw):
    with pytest.raises((ValueError, KeyError, TypeError)):  # which the ledger makes an error of its own
        State.decode(raw)


@QUICK
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=100), max_size=300))
def test_no_more_is_claimed_than_a_message_holds(names):
    most, state.MOST_BYTES = state.MOST_BYTES, 5_000
    try:
        found = State({0: Partition(0)})
        given = [name for offset, name in enumerate(names) if found.claim(0, offset, Claim(name, 1e10, 2**40))]
        assert len(found.encode()) <= 3 * state.MOST_BYTES  # room up to what a broker takes
        assert found.full == (len(given) < len(names))
        assert len(found.partitions[0].open) == len(given)
    finally:
        state.MOST_BYTES = most
