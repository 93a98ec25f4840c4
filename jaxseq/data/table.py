"""Tables of numbers over time."""

import csv
import gzip
import math
import os
import zlib
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

MISSING = ("", "nan", "na", "null", "none", "?")


class Table(NamedTuple):
    """Rows in the order of time."""

    values: np.ndarray  # T V float64, NaN where a value is missing
    names: tuple[str, ...]
    dates: np.ndarray | None  # T datetime64[s]

    @property
    def length(self) -> int:
        return len(self.values)


def read_table(
    path: str | os.PathLike[str], *, date: str | None = "date", missing: str = "raise", unordered: str = "raise"
) -> Table:
    """A table separated by commas, which may be gzipped: a row a time step, a column a variate.

    A first row that is no row of numbers is a header. The column `date`, where there is one, holds times as ISO 8601
    writes them; any other column is of numbers. Values that are `missing` raise, or take the last value before them
    ("forward"; a column's first ones take the next). Times that come twice or go back raise, or stay as they are in
    `unordered` ("keep"), as where clocks were set back.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: the file is no such table: no text, rows of unequal length, words among the numbers, times that are
        none, come twice or go back, missing values, or a column without any.
    """
    path = Path(path).expanduser()
    if missing not in ("raise", "forward"):
        raise ValueError(f"missing={missing!r}; choose 'raise' or 'forward'.")
    if unordered not in ("raise", "keep"):
        raise ValueError(f"unordered={unordered!r}; choose 'raise' or 'keep'.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a table of numbers separated by commas.")
    rows = _rows(path)
    header = None if _is_numbers(rows[0][1]) else [name.strip() for name in rows[0][1]]
    if (header and len(rows) == 1) or not rows:
        raise ValueError(f"{path} has a header and no rows.")
    body = rows[1:] if header else rows
    names = header or [str(n) for n in range(len(rows[0][1]))]
    at = names.index(date) if date in names else None
    dates = None if at is None else _dates(path, [(line, row[at]) for line, row in body], unordered)
    kept = [n for n in range(len(names)) if n != at]
    if not kept:
        raise ValueError(f"{path} has no column beside {date!r}.")
    values = np.array([[_number(path, line, names[n], row[n]) for n in kept] for line, row in body])
    names = [names[n] for n in kept]
    empty = np.isnan(values)
    if empty.all(axis=0).any():
        raise ValueError(f"{path}: column {names[int(np.argmax(empty.all(axis=0)))]!r} holds no numbers.")
    if empty.any() and missing == "raise":
        row, column = np.argwhere(empty)[0]
        where = f"{path}, line {body[row][0]}: {names[column]!r} is missing, one of {empty.sum()} values"
        raise ValueError(f"{where}; fill them, or choose missing='forward'.")
    return Table(filled_forward(values), tuple(names), dates)


def filled_forward(values: np.ndarray) -> np.ndarray:
    """`T V` with the last value before each NaN in its place, the first one after where none is before."""
    rows = np.arange(len(values))[:, None]
    there = ~np.isnan(values)
    last = np.maximum.accumulate(np.where(there, rows, -1), axis=0)
    return np.take_along_axis(values, np.where(last < 0, there.argmax(axis=0)[None], last), axis=0)


def plain_text(path: Path) -> str:
    """The text of a file, which may be gzipped.

    Raises:
      ValueError: it is damaged, or no text.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}).") from None
    if b"\0" in content:
        raise ValueError(f"{path} is no text; save it as text, in UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")  # degrees, squares and names


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """Rows with their line numbers, all of one length."""
    text = plain_text(path)
    reader = csv.reader(text.splitlines())
    rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    if not rows:
        raise ValueError(f"{path} is empty.")
    width = len(rows[0][1])
    for line, row in rows:
        if len(row) != width:
            raise ValueError(f"{path}, line {line}: {len(row)} cells, and {width} in the first row.")
    return rows


def _is_numbers(row: list[str]) -> bool:
    """Whether every cell is a number or missing, and one is a number."""
    found = []
    for cell in row:
        try:
            found.append(float(cell))
        except ValueError:
            if cell.strip().lower() not in MISSING:
                return False
    return bool(found)


def _number(path: Path, line: int, name: str, cell: str) -> float:
    if cell.strip().lower() in MISSING:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        raise ValueError(f"{path}, line {line}: {name!r} is {cell!r}, which is no number.") from None
    if math.isinf(value):
        raise ValueError(f"{path}, line {line}: {name!r} is {cell!r}, which is not finite.")
    return value


def _dates(path: Path, cells: list[tuple[int, str]], unordered: str) -> np.ndarray:
    dates, before = [], None
    for line, cell in cells:
        try:
            date = datetime.fromisoformat(cell.strip()).replace(tzinfo=None)
        except ValueError:
            raise ValueError(f"{path}, line {line}: {cell!r} is no time as 2016-07-01 00:00:00.") from None
        if unordered == "raise" and before is not None and date <= before:
            fault = "comes twice" if date == before else f"comes after {before}"
            raise ValueError(f"{path}, line {line}: {date} {fault}; times must go on from row to row.")
        dates.append(date)
        before = date
    return np.array(dates, "datetime64[s]")
