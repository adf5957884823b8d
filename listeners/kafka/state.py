"""What is known of one group's queue on one topic: who has what, and from where on nobody has anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

# Bytes of a written state beyond which no more claims are made; a broker takes a message of a megabyte.
MOST_BYTES = 700_000
# What a claim takes in a written state, besides the wait's id.
_CLAIM_BYTES = 80
# The form that is written. It is frozen: waits that began before an upgrade are in it.
_VERSION = 1

RELEASED = ""
"""Holds what a wait has given back."""


@dataclass(frozen=True)
class Claim:
    """
    Who has a message that is not committed.

    :param wait: the wait's id, or `RELEASED`.
    :param until: seconds since the epoch after which another wait may take it.
    :param mark: a place in the log of commits before which this claim's commit is not.
    """

    wait: str
    until: float
    mark: int


@dataclass
class Partition:
    """
    One partition: what lies below ``next`` is committed, or not there at all, unless it is in ``open``.

    :param next: the first offset that nobody has claimed yet.
    :param open: claims by offset.
    """

    next: int
    open: dict[int, Claim] = field(default_factory=dict)

    @property
    def watermark(self) -> int:
        """The lowest offset that is not committed, which is what the group's committed offset says."""
        return min(self.open, default=self.next)


class State:
    """
    The partitions of one topic, for one group.

    Its methods change it in place and are made again on a newer state if the change came too late.

    :ivar changed: whether it is to be written.
    :ivar full: whether a claim was refused for want of room.
    :ivar commits: partition, offset and wait of what was committed since it was read.
    """

    def __init__(self, partitions: dict[int, Partition] | None = None) -> None:
        self.partitions = partitions or {}
        self.changed = False
        self.full = False
        self.commits: list[tuple[int, int, str]] = []
        self._bytes = sum(len(claim.wait) + _CLAIM_BYTES for _, _, claim in self.claims())

    def copy(self) -> State:
        """Return a state that can be changed without changing this one."""
        copied = State({number: Partition(p.next, dict(p.open)) for number, p in self.partitions.items()})
        copied.changed = self.changed
        return copied

    def claims(self) -> Iterator[tuple[int, int, Claim]]:
        """Return partition, offset and claim of all that is claimed, or was given back."""
        for number, partition in self.partitions.items():
            for offset, claim in partition.open.items():
                yield number, offset, claim

    def claim(self, partition: int, offset: int, claim: Claim) -> bool:
        """
        Let a wait have a message that is free; False if there is no room for another claim.

        Whoever calls it knows that between ``next`` and ``offset`` there is no message.
        """
        if offset not in self.partitions[partition].open:
            if self._bytes + len(claim.wait) + _CLAIM_BYTES > MOST_BYTES:
                self.full = True
                return False
            self._bytes += len(claim.wait) + _CLAIM_BYTES
        self.partitions[partition].open[offset] = claim
        self.partitions[partition].next = max(self.partitions[partition].next, offset + 1)
        self.changed = True
        return True

    def holder(self, partition: int, offset: int) -> str | None:
        """Return the wait that has a message, `RELEASED`, or None if it is committed or was never given out."""
        found = self.partitions.get(partition)
        claim = found.open.get(offset) if found else None
        return claim.wait if claim else None

    def commit(self, partition: int, offset: int) -> None:
        """Note that whoever has the message has committed it."""
        claim = self.partitions[partition].open.pop(offset)
        self.commits.append((partition, offset, claim.wait))
        self.changed = True

    def release(self, wait: str) -> None:
        """Let others have at once what ``wait`` has claimed."""
        for number, offset, claim in list(self.claims()):
            if claim.wait == wait:
                self.partitions[number].open[offset] = Claim(RELEASED, 0, claim.mark)
                self.changed = True

    def forget(self, partition: int, offset: int) -> None:
        """Drop a claim on a message that the topic does not have any more."""
        if self.partitions[partition].open.pop(offset, None) is not None:
            self.changed = True

    def begin(self, partition: int, offset: int) -> None:
        """Begin anew at ``offset``: nothing below it is given out, everything from it on is."""
        known = self.partitions.get(partition)
        if known is not None and offset > known.watermark:
            kept = {place: claim for place, claim in known.open.items() if place >= offset}
            self.partitions[partition] = Partition(max(offset, known.next), kept)
        else:
            self.partitions[partition] = Partition(offset)
        self.changed = True

    def encode(self) -> bytes:
        """Write it."""
        partitions = {
            str(number): {"next": p.next, "open": {str(offset): asdict(claim) for offset, claim in p.open.items()}}
            for number, p in self.partitions.items()
        }
        return json.dumps({"version": _VERSION, "partitions": partitions}, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, raw: bytes) -> State:
        """
        Read what `encode` wrote.

        :raises ValueError: it is something else, or of a later version.
        """
        stored = json.loads(raw)
        if stored["version"] != _VERSION:
            raise ValueError(f"it is of version {stored['version']}, and this is {_VERSION}")
        return cls({
            int(number): Partition(p["next"], {int(offset): Claim(**claim) for offset, claim in p["open"].items()})
            for number, p in stored["partitions"].items()
        })  # fmt: skip
