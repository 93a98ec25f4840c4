"""Times of rows: what a cell says, whether rows step evenly, and the times after the last one."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np

#: What a column of times is called, in small letters or large.
NAMES = ("date", "time", "timestamp", "datetime")


class Step(NamedTuple):
    """From a time to the next: so many microseconds, months, or business days, which are Monday to Friday."""

    unit: str  # "us", "month" or "business day"
    size: float
    day: int = 0  # of the month; the last of a month that has fewer
    digit: int = 1  # microseconds in the last digit that times are written with

    def after(self, dates: np.ndarray, number: int | np.ndarray) -> np.ndarray:
        """The times so many steps later, each moved to the day of the month or the working day that steps lead to."""
        number = np.asarray(number)
        if self.unit == "us":
            digits = np.round(number * self.size / self.digit).astype(int)
            return dates + (digits * self.digit).astype("timedelta64[us]")
        days, number = dates.astype("datetime64[D]"), number * int(self.size)
        clock = dates - days
        if self.unit == "business day":
            return np.busday_offset(days, number, roll="forward") + clock
        months = dates.astype("datetime64[M]") + number
        last = (months + 1).astype("datetime64[D]") - np.timedelta64(1, "D")
        return np.minimum(months.astype("datetime64[D]") + (self.day - 1), last) + clock

    def odd(self, dates: np.ndarray) -> np.ndarray:
        """Which rows, `T` bool, are no step after the one before; those that go back or stay are not judged."""
        steps = np.diff(dates)
        if self.unit == "us":
            # 1/64 s is written as 15 or 16 ms; a row that is left out is off by much more.
            off = np.abs(steps.astype(int) - self.size) > self.digit * (self.size >= 4 * self.digit)
        else:
            off = self.after(dates[:-1], 1) != dates[1:]
        first = self.after(dates[:1], 0) != dates[:1]
        return np.append(first, off & (steps > np.timedelta64(0, "us")))

    def __str__(self) -> str:
        if self.unit != "us":
            return f"{self.size:g} {self.unit}{'s' * (self.size > 1)}"
        step = timedelta(microseconds=self.size)
        return str(step) if step % timedelta(days=1) else f"{step.days} day{'s' * (step.days > 1)}"


def time_of(cell: str) -> datetime:
    """A time as ISO 8601 writes it, in UTC where it has an offset; a month as 2016-07 is its first day.

    Raises:
      ValueError: it is none.
    """
    cell = cell.strip()
    try:
        time = datetime.fromisoformat(cell)
    except ValueError:
        time = datetime.fromisoformat(f"{cell}-01")
    try:
        return time if time.tzinfo is None else time.astimezone(UTC).replace(tzinfo=None)
    except OverflowError:
        raise ValueError(f"{cell!r} is before the year 1 or after 9999 in UTC.") from None


def regular_step(dates: np.ndarray) -> Step:
    """The step that leaves the fewest rows odd: of a fixed time, of calendar months, or of business days.

    Raises:
      ValueError: no row is later than the one before.
    """
    dates = np.asarray(dates, "datetime64[us]")
    on = dates[1:] > dates[:-1]
    if not on.any():
        raise ValueError(f"{len(dates)} times, of which none is later than the one before, have no step.")
    steps, months = np.diff(dates)[on].astype(int), dates.astype("datetime64[M]")
    digit = next(digit for digit in (10**6, 10**3, 1) if not (dates.astype(int) % digit).any())
    usual = _most(steps)
    near = steps[np.abs(steps - usual) <= digit] if usual >= 4 * digit else np.array([usual])
    found = [Step("us", float(near.mean()), digit=digit)]
    if (count := _most(np.diff(months)[on].astype(int))) > 0:
        days = (dates.astype("datetime64[D]") - months.astype("datetime64[D]")).astype(int) + 1
        # Before the fixed one: July to September, on the first, has two steps of 31 days. Last days come first.
        found = [Step("month", count, 31), Step("month", count, _most(days)), *found]
    if usual == timedelta(days=1) // timedelta(microseconds=1):
        found.append(Step("business day", 1))
    return min(found, key=lambda step: step.odd(dates).sum())


def season_length(dates: np.ndarray, most: int) -> int | None:
    """How many of the regular steps of `T` datetime64 are a day, week, year or hour: the first that is 2 to `most`."""
    step = regular_step(dates)
    if step.unit != "us":
        found: list[float] = [12 / step.size] if step.unit == "month" else [5, 261]
    else:
        wholes = (timedelta(days=1), timedelta(weeks=1), timedelta(days=365.25), timedelta(hours=1))
        found = [whole / timedelta(microseconds=1) / step.size for whole in wholes]
    return next((round(n) for n in found if 2 <= round(n) <= most), None)


def dates_ahead(dates: np.ndarray, count: int) -> np.ndarray:
    """The `count` times after the last of `T` datetime64, in microseconds, by the step that most rows take.

    Months stay on their day, or the last where they are shorter; business days leave out Saturday and Sunday.

    Raises:
      ValueError: `count` is below 0, or no row is later than the one before.
    """
    if count < 0:
        raise ValueError(f"count={count} must be at least 0.")
    dates = np.asarray(dates, "datetime64[us]")
    return regular_step(dates).after(dates[-1], np.arange(1, count + 1))


def read_dates(path: Path, cells: list[tuple[int, str]], *, unordered: str, uneven: str) -> np.ndarray:
    """The times `T` datetime64[us] of cells with their line numbers.

    Raises:
      ValueError: one is no time, comes twice or goes back unless `unordered` is "keep", or is no regular step after
        the one before unless `uneven` is.
    """
    times: list[datetime] = []
    for line, cell in cells:
        try:
            time = time_of(cell)
        except ValueError:
            hint = "write it so, or name the column in leave_out"
            raise ValueError(f"{path}, line {line}: {cell[:40]!r} is no time as 2016-07-01 00:00:00; {hint}.") from None
        if unordered == "raise" and times and time <= times[-1]:
            fault = "comes twice" if time == times[-1] else f"comes after {times[-1]}"
            raise ValueError(f"{path}, line {line}: {time} {fault}; times must go on from row to row.")
        times.append(time)
    dates = np.array(times, "datetime64[us]")
    if uneven == "raise" and (dates[1:] > dates[:-1]).any():
        step = regular_step(dates)
        if (odd := step.odd(dates)).any():
            row = max(int(odd.argmax()), 1)
            raise ValueError(
                f"{path}, line {cells[row][0]}: {times[row]} is not {step} after {times[row - 1]}, which is the step "
                "of most rows; fill in what is missing, or set uneven to 'keep'."
            )
    return dates


def _most(values: np.ndarray) -> int:
    """The value that comes most often, the least of these."""
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()])
