"""Rows of results, one for each model that was measured: those with given fields, and their means."""

from collections.abc import Iterable
from typing import Any

import numpy as np

Row = dict[str, Any]


def where(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """The rows whose fields are these.

    Raises:
      KeyError: a row has no field of the name.
    """
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def grouped(rows: Iterable[Row], *names: str) -> dict[Any, list[Row]]:
    """Rows by their value of a field, or by their values of several; groups come as their first rows do.

    Raises:
      KeyError: a row has no field of the name.
    """
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        groups.setdefault(key if len(names) > 1 else key[0], []).append(row)
    return groups


def mean_of(rows: Iterable[Row], name: str, *, known: bool = False) -> float:
    """The mean of a field; NaN where one is None, as JSON has what is not finite, or with `known` without these.

    NaN where there are no rows.

    Raises:
      KeyError: a row has no field of the name.
    """
    values = [row[name] for row in rows if not (known and row[name] is None)]
    return float(np.mean(np.array(values, float))) if values else float("nan")
