"""A JSON object, word by word, each of the kind that is asked for."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a value may be, in words and as a test, and the value in our types."""

    allowed: str
    holds: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda value: value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _limit(value: Any) -> Any:
    """Infinity as the library writes it, which JSON has no word for; the rest as it is."""
    return math.inf if value == {"__float__": "Infinity"} else value


def _is_token(value: Any) -> bool:
    return type(value) is int and value >= 0


COUNT = Kind("a whole number, 1 or more", lambda value: type(value) is int and value >= 1)
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
FLAG = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("a string", lambda value: type(value) is str)
OBJECT = Kind("an object", lambda value: type(value) is dict)
FILES = Kind(
    "an object of names of files beside it",
    lambda value: type(value) is dict and all(type(x) is str and Path(x).name == x for x in value.values()),
)
RANK = Kind('a whole number, 1 or more, or "auto"', lambda value: value == "auto" or COUNT.holds(value))
LIMITS = Kind(
    'two numbers; the second may be Infinity or {"__float__": "Infinity"}',
    lambda value: (
        type(value) in (list, tuple)
        and len(value) == 2
        and _is_number(value[0])
        and (_is_number(value[1]) or _limit(value[1]) == math.inf)
    ),
    lambda value: (float(value[0]), float(_limit(value[1]))),
)
TOKENS = Kind(
    "a token's number, 0 or more, or a list of them",
    lambda value: all(map(_is_token, value)) if type(value) is list else _is_token(value),
    lambda value: tuple(value) if type(value) is list else (value,),
)


def optional(kind: Kind) -> Kind:
    """The kind, or null."""
    read = lambda value: None if value is None else kind.read(value)
    return Kind(f"{kind.allowed}, or null", lambda value: value is None or kind.holds(value), read)


class Words:
    """The values of an object of the file `where`; `asked` are the names that were looked at."""

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        self.values, self.where = values, where
        self.asked: set[str] = set()

    def __call__(self, name: str, kind: Kind, *default: Any) -> Any:
        """The value of a name, in our types; the default, where one is given, if there is none.

        Raises:
          ValueError: there is neither, or the value is of another kind.
        """
        self.asked.add(name)
        if name not in self.values:
            if default:
                return default[0]
            raise ValueError(f"{self.where} misses {name!r}; give {kind.allowed}.")
        value = self.values[name]
        if not kind.holds(value):
            raise ValueError(f"{self.where} has {name}={value!r}; give {kind.allowed}.")
        return kind.read(value)

    def need(self, **wanted: Any) -> None:
        """Raise where a value is there and is another: one that our mixers do not do."""
        for name, value in wanted.items():
            self.asked.add(name)
            if self.values.get(name, value) != value:
                raise ValueError(f"{self.where} has {name}={self.values[name]!r}; it is read with {value!r} alone.")
