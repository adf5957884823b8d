"""What people have in a module beside a DAG file."""

from __future__ import annotations

import abc
import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, Flag, auto
from typing import Any, Generic, NamedTuple, Protocol, TypedDict, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
KINDS = {"order", "refund", "cancelled", "two words", "zebra"}
PAIRS = frozenset({("a", 1), ("b", 2), ("c", 3), (1, "a"), (True, None)})
PATTERN = re.compile(r"(\w+)-(\d+)")
TABLE = {"a": {"set", "in", "a", "dict"}, "b": [1, 2.5, None, -0.0, 0.0]}


class Color(Enum):
    RED = "red"
    GREEN = "green"

    def shout(self) -> str:
        return self.value.upper()


class Bits(Flag):
    A = auto()
    B = auto()


class Point(NamedTuple):
    x: int
    y: int = 0


class Shape(Protocol):
    def area(self) -> float: ...


class Options(TypedDict, total=False):
    a: int
    b: str


class Base(abc.ABC):
    @abc.abstractmethod
    def one(self) -> int: ...

    @abc.abstractmethod
    def two(self) -> int: ...

    @abc.abstractmethod
    def three(self) -> int: ...


class Slotted(Base):
    __slots__ = ("kept",)

    def one(self) -> int:
        return 1

    def two(self) -> int:
        return 2

    def three(self) -> int:
        return 3


class First: ...


class Second: ...


Base.register(First)
Base.register(Second)


@dataclass
class Order(Generic[T]):
    id: str
    lines: list[str] = field(default_factory=list)
    color: Color = Color.RED

    @functools.cached_property
    def upper(self) -> str:
        return self.id.upper()

    @property
    def is_known(self) -> bool:
        return self.id in {"one", "two", "three", "four"}


@dataclass(frozen=True)
class Frozen:
    a: int = 1
    b: tuple[Any, ...] = (1, 2.0, "s", 1j, b"x", ...)


@functools.lru_cache(maxsize=100)
def normal(text: str) -> str:
    return text.strip().lower()


def times(count: int) -> Callable[[Any], Any]:
    seen = {"of", "a", "closure"}

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            return [function(*args, **kwargs)] * count, sorted(seen)

        return inner

    return wrap


@times(2)
def shout(text: str, *, loud: bool = True) -> str:
    """Say it."""
    log.debug("shouting")
    return text.upper() + ("!" if loud else "")
