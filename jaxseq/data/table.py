"""Tables of numbers over time."""

import csv
import gzip
import io
import math
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .dates import NAMES, read_dates, time_of

MISSING = ("", "nan", "na", "n/a", "#n/a", "null", "none", "?")
#: What a damaged gzip raises when it is read.
DAMAGED = (gzip.BadGzipFile, zlib.error, EOFError)


class Table(NamedTuple):
    """Rows in the order of time."""

    values: np.ndarray  # T V float64, NaN where a value is missing
    names: tuple[str, ...]
    dates: np.ndarray | None  # T datetime64[us], in UTC where a time has an offset

    @property
    def length(self) -> int:
        return len(self.values)


def read_table(
    path: str | os.PathLike[str],
    *,
    date: str | None = None,
    leave_out: Iterable[str] = (),
    encoding: str = "utf-8",
    missing: str = "raise",
    unordered: str = "raise",
    uneven: str = "raise",
) -> Table:
    """A table separated by commas, which may be gzipped: a row a time step, a column a variate.

    A first row that is no row of numbers is a header. The column `date` holds times as ISO 8601 writes them; where
    None, the first that is called date, time, timestamp or datetime, in small letters or large, and is not of plain
    numbers. Any other column is of numbers, or named in `leave_out`; one of those names whose numbers rise from row to
    row, as seconds do, is refused where there are no times.

    No `encoding` is guessed: bytes of another one could be read as names that nobody gave. Spreadsheets of Windows save
    in "cp1252" in the west, "cp1251" in Cyrillic and "cp932" in Japanese.

    Values that are `missing`, all of an empty line but for those at the end, raise, or take the last value before them
    ("forward"; a column's first ones take the next). Times that come twice or go back raise, or stay as they are in
    `unordered` ("keep"), as where clocks were set back. Times whose steps are `uneven` raise, or stay ("keep"); months,
    quarters, years and the days from Monday to Friday are even, and so is what differs in the last digit alone.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: the file is no such table: no text, or not in `encoding`, rows of unequal length, columns without a
        name or of the same one, no column that an argument names, words among the numbers, times that are none, come
        twice, go back or step unevenly, missing values, or a column without any.
    """
    path = Path(path).expanduser()
    if isinstance(leave_out, str):
        raise TypeError(f"leave_out={leave_out!r} is one name; give a sequence of names, as [{leave_out!r}].")
    choices = {"missing": (missing, "forward"), "unordered": (unordered, "keep"), "uneven": (uneven, "keep")}
    for name, (value, other) in choices.items():
        if value not in ("raise", other):
            raise ValueError(f"{name}={value!r}; choose 'raise' or {other!r}.")
    if not path.is_file():
        fault = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {fault}; name a table of numbers separated by commas.")
    columns, body = _parted(path, _rows(path, encoding))
    left_out = {_column(path, columns, "leave_out", name) for name in leave_out}
    kept = [n for n in range(len(columns)) if n not in left_out]
    names, body = [columns[n] for n in kept], [(line, [row[n] for n in kept]) for line, row in body]
    at = _date_column(path, names, body, date)
    dates = None
    if at is not None:
        dates = read_dates(path, [(line, row[at]) for line, row in body], unordered=unordered, uneven=uneven)
    kept = [n for n in range(len(names)) if n != at]
    if not kept:
        raise ValueError(f"{path} has no column beside {', '.join(map(repr, columns))}.")
    values = np.array([[_number(path, line, names[n], row[n]) for n in kept] for line, row in body])
    names = [names[n] for n in kept]
    empty = np.isnan(values)
    if empty.all(axis=0).any():
        raise ValueError(
            f"{path}: column {names[int(np.argmax(empty.all(axis=0)))]!r} holds no numbers; leave_out can name it."
        )
    if empty.any() and missing == "raise":
        row, column = np.argwhere(empty)[0]
        where = f"{path}, line {body[row][0]}: {names[column]!r} is missing, one of {empty.sum()} values"
        raise ValueError(f"{where}; fill them, or set missing to 'forward'.")
    return Table(filled_forward(values), tuple(names), dates)


def filled_forward(values: np.ndarray) -> np.ndarray:
    """`T V` with the last value before each NaN in its place, the first one after where none is before."""
    rows = np.arange(len(values))[:, None]
    there = ~np.isnan(values)
    last = np.maximum.accumulate(np.where(there, rows, -1), axis=0)
    return np.take_along_axis(values, np.where(last < 0, there.argmax(axis=0)[None], last), axis=0)


def plain_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a file, which may be gzipped.

    Raises:
      ValueError: it is damaged, no text, or not in `encoding`.
    """
    content, hint = _unpacked(path), ", or set encoding to its own, as 'utf-16'"
    try:
        return _checked(path, content.decode(encoding), hint)
    except LookupError:
        raise ValueError(f"encoding={encoding!r} is none that Python knows, as 'utf-8' and 'cp1252' are.") from None
    except UnicodeDecodeError as fault:
        before = _checked(path, content.decode("latin-1"), hint)[: fault.start]
        line, byte = before.count("\n") + 1, content[fault.start]
        raise ValueError(
            f"{path}, line {line}: the byte {byte:#04x} is not in {encoding}; save it in UTF-8, or set encoding to its "
            "own, as 'cp1252'."
        ) from None


def archive_text(path: Path) -> str:
    """The text of an archive's file, gzipped or not, in UTF-8, or else a character for each byte: remarks alone are in
    other encodings there.

    Raises:
      ValueError: it is damaged or no text.
    """
    content = _unpacked(path)
    try:
        return _checked(path, content.decode("utf-8"))
    except UnicodeDecodeError:
        return _checked(path, content.decode("latin-1"))


def _unpacked(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged ({error}).") from None


def _checked(path: Path, text: str, hint: str = "") -> str:
    if "\0" in text:
        raise ValueError(f"{path} is no text; save it as text, in UTF-8{hint}.")
    return text.removeprefix("\ufeff")


def number(cell: str) -> float:
    """A number as files write it, NaN where it is missing.

    Raises:
      ValueError: it is none; 1_000, which Python reads, is none in a table.
    """
    if cell.strip().lower() in MISSING:
        return math.nan
    if "_" in cell:
        raise ValueError(f"{cell[:40]!r} is no number.")
    return float(cell)


def _rows(path: Path, encoding: str) -> list[tuple[int, list[str]]]:
    """Rows with their line numbers, all of one length; empty lines at the end are none, others are of empty cells."""
    reader = csv.reader(io.StringIO(plain_text(path, encoding), newline=""))
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; is it a table?") from None
    blank = lambda row: len(row) < 2 and not "".join(row).strip()
    while rows and blank(rows[-1][1]):
        rows.pop()
    if not rows:
        raise ValueError(f"{path} is empty.")
    first = next(row for _, row in rows if not blank(row))
    width = len(first)
    if width == 1 and (other := next((sign for sign in ";\t|" if sign in first[0]), None)):
        raise ValueError(f"{path} has {other!r} between its columns; save it with commas, and points in numbers.")
    rows = [(line, [""] * width if blank(row) else row) for line, row in rows]
    for line, row in rows:
        if len(row) != width:
            raise ValueError(f"{path}, line {line}: {len(row)} cells, and {width} in the first row.")
    return rows


def _parted(path: Path, rows: list[tuple[int, list[str]]]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The names of the columns, their numbers where there is no header, and the rows."""
    first = next((n for n, (_, row) in enumerate(rows) if any(cell.strip() for cell in row)), None)
    if first is None:
        raise ValueError(f"{path} is empty.")
    header = [name.strip() for name in rows[first][1]]
    if _is_numbers(header):
        return [str(n) for n in range(len(header))], rows
    if "" in header:
        raise ValueError(
            f"{path}: column {header.index('') + 1} has no name; call it 'date' if it is of times, and take it out of "
            "the file if it counts the rows."
        )
    if twice := [name for n, name in enumerate(header) if name in header[:n]]:
        raise ValueError(f"{path}: two columns are called {twice[0]!r}.")
    if len(rows) == first + 1:
        raise ValueError(f"{path} has a header and no rows.")
    return header, rows[first + 1 :]


def _column(path: Path, names: list[str], argument: str, name: str) -> int:
    """Where the column is that an argument names."""
    if name not in names:
        raise ValueError(f"{path} has no column {name!r}, which {argument} names; choose from {', '.join(names)}.")
    return names.index(name)


def _date_column(path: Path, names: list[str], body: list[tuple[int, list[str]]], date: str | None) -> int | None:
    if date is not None:
        return _column(path, names, "date", date)
    # Of the cells the first that is there tells.
    first = lambda n: next((row[n] for _, row in body if row[n].strip().lower() not in MISSING), "0")
    of_times = lambda cell: not _is_numbers([cell]) or _is_time(cell)
    called = [n for n, name in enumerate(names) if name.lower() in NAMES]
    found = next((n for n in called if of_times(first(n))), None)
    counter = next((names[n] for n in called if _rises([row[n] for _, row in body])), None)
    if found is None and counter is not None:
        raise ValueError(
            f"{path}: {counter!r} counts up in plain numbers; write times as 2016-07-01 00:00:00, name the column in "
            "leave_out, or call it otherwise if it is a variate."
        )
    return found


def _rises(cells: list[str]) -> bool:
    """Whether these are numbers, two or more, each above the one before, as seconds since 1970 are."""
    try:
        return len(cells) > 1 and bool((np.diff([number(cell) for cell in cells]) > 0).all())
    except ValueError:
        return False


def _is_time(cell: str) -> bool:
    try:
        time_of(cell)
    except ValueError:
        return False
    return True


def _is_numbers(row: list[str]) -> bool:
    """Whether every cell is a number or missing, and one is a number."""
    try:
        return not all(math.isnan(number(cell)) for cell in row)
    except ValueError:
        return False


def _number(path: Path, line: int, name: str, cell: str) -> float:
    where = lambda: f"{path}, line {line}: {name!r} is {cell[:40]!r}, which is"
    try:
        value = number(cell)
    except ValueError:
        raise ValueError(f"{where()} no number; leave_out can name the column, or date if it is of times.") from None
    if math.isinf(value):
        raise ValueError(f"{where()} not finite.")
    return value
