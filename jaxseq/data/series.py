"""Multivariate time series: split by time, scaled by what is trained on, cut into windows."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..train.files import atomically
from .dates import dates_ahead
from .epochs import epoch_rows
from .table import Table


def time_marks(dates: np.ndarray) -> np.ndarray:
    """Hour of the day, day of the week, of the month and of the year, `T 4`, each from −0.5 to 0.5.

    Where the minute differs from row to row it comes before them, `T 5`, as in the files of the Informer authors.
    """
    days = dates.astype("datetime64[D]")
    since = lambda unit: (days - dates.astype(f"datetime64[{unit}]").astype("datetime64[D]")).astype(int)
    hours = (dates - days).astype("timedelta64[h]").astype(int)
    minutes = (dates - dates.astype("datetime64[h]")).astype("timedelta64[m]").astype(int)
    weekday = (days.astype(int) + 3) % 7  # 1970-01-01 was a Thursday; weeks start on Monday
    marks = [hours / 23, weekday / 6, since("M") / 30, since("Y") / 365]
    if (minutes != minutes[:1]).any():
        marks = [minutes / 59, *marks]
    return (np.stack(marks, axis=1) - 0.5).astype(np.float32)


class Borders(NamedTuple):
    """How many rows are for training, validation and test, from the first on."""

    train: int
    validation: int
    test: int

    @classmethod
    def of_shares(cls, length: int, train: float = 0.7, test: float = 0.2) -> "Borders":
        first, last = int(length * train), int(length * test)
        return cls(first, length - first - last, last)


#: Twelve months of hours for training, four for validation, four for test, of 30 days each: the ETT hourly tables.
ETT_HOURLY = Borders(12 * 30 * 24, 4 * 30 * 24, 4 * 30 * 24)
#: The same months of the ETT tables that have a row each quarter of an hour.
ETT_MINUTES = Borders(*(4 * rows for rows in ETT_HOURLY))


class Windows(NamedTuple):
    """Windows of a part of a series: `lookback` steps to see and `horizon` to forecast, starting at each row."""

    series: np.ndarray  # T V float32, scaled
    marks: np.ndarray | None  # T C
    lookback: int
    horizon: int

    @property
    def number(self) -> int:
        return len(self.series) - self.lookback - self.horizon + 1

    def at(self, starts: np.ndarray) -> dict[str, np.ndarray]:
        """`inputs N L V`, `targets N S V` and, where there are any, the `marks N L C` of the inputs."""
        seen = np.asarray(starts)[:, None] + np.arange(self.lookback)
        batch = {"inputs": self.series[seen], "targets": self.series[seen[:, -1:] + 1 + np.arange(self.horizon)]}
        return batch if self.marks is None else batch | {"marks": self.marks[seen]}

    @property
    def at_once(self) -> int:
        """How many to read at once where all are read: 256, of wide tables fewer."""
        return min(256, max(1, 2**22 // self.series[: self.lookback + self.horizon].size))

    def batches(self, size: int, seed: int, starts: np.ndarray | None = None, *, variates: float = 1.0):
        """`step -> batch`, a function of the step alone: each epoch in an order of its own, whole batches.

        Windows begin at `starts`, at every row where None; they are of a share of the variates, drawn for each step.

        Raises:
          ValueError: there are fewer windows than one batch takes, or `variates` is not above 0 and at most 1.
        """
        if not 0 < variates <= 1:
            raise ValueError(f"variates={variates}; a share is above 0 and at most 1.")
        starts = np.arange(self.number) if starts is None else starts
        rows = epoch_rows(len(starts), size, seed, of="windows")
        if variates == 1:
            return lambda step: self.at(starts[rows(step)])
        number = self.series.shape[1]

        def some(step: int) -> dict[str, np.ndarray]:
            drawn = np.random.default_rng((seed, step)).permutation(number)[: max(1, round(variates * number))]
            drawn.sort()  # a mixer may go by their order
            batch = self.at(starts[rows(step)])
            return batch | {name: batch[name][..., drawn] for name in ("inputs", "targets")}

        return some


def pooled(parts: Sequence[np.ndarray], lookback: int, horizon: int, *, stride: int = 1) -> tuple[Windows, np.ndarray]:
    """Series `T V` end to end, and where windows begin that are each of one series: every `stride` rows, and the last.

    Raises:
      ValueError: a number is below 1, or no series is as long as a window.
    """
    for name, value in (("lookback", lookback), ("horizon", horizon), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    numbers = [len(part) - lookback - horizon + 1 for part in parts]
    if max(numbers, default=0) < 1:
        raise ValueError(f"no series is as long as a window of lookback={lookback} and horizon={horizon}.")
    offsets = np.cumsum([0, *map(len, parts)])[:-1]
    # The last window of a series forecasts its last rows, be they a whole stride after the one before or not.
    starts = [
        offset + np.append(np.arange(0, number - 1, stride), number - 1)
        for offset, number in zip(offsets, numbers, strict=True)
        if number > 0
    ]
    return Windows(np.concatenate(parts), None, lookback, horizon), np.concatenate(starts)


class Series(NamedTuple):
    """A series in three parts, in units of the deviation of the first."""

    train: Windows
    validation: Windows
    test: Windows
    mean: np.ndarray  # V
    deviation: np.ndarray  # V
    names: tuple[str, ...]
    latest: dict[str, np.ndarray]  # the table's last rows: `inputs 1 L V`, and `marks 1 L C` where there are any
    dates: np.ndarray | None  # of the table's rows


def forecasting_series(
    table: Table, lookback: int, horizon: int, borders: Borders | None = None, *, marks: bool = False
) -> Series:
    """Windows for training, validation and test, shifted and scaled by mean and deviation of the rows for training.

    The parts follow one another in time; the first windows of a later part see the last rows of the one before, and
    forecast none of them. Borders may end before the table does. `borders` are 70, 10 and 20 % of the rows where None.

    Raises:
      ValueError: a number is below 1, the parts need more rows than there are, a part is shorter than its windows, a
        column is constant over the rows for training or too large for a finite deviation, or `marks` of a table without
        dates.
    """
    for name, value in (("lookback", lookback), ("horizon", horizon)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    borders = Borders.of_shares(table.length) if borders is None else borders
    if min(borders) < 0 or sum(borders) > table.length:
        raise ValueError(f"{borders} take {sum(borders)} rows; the table has {table.length}.")
    if marks and table.dates is None:
        raise ValueError("marks=True; the table has no dates.")
    trained = table.values[: borders.train]
    needed = {"train": lookback + horizon, "validation": horizon, "test": horizon}
    for name, rows in borders._asdict().items():
        if rows < needed[name]:
            raise ValueError(
                f"{rows} rows for {name} of {table.length} are too few for lookback={lookback} and horizon={horizon}, "
                f"which take {needed[name]}."
            )
    with np.errstate(all="ignore"):
        mean, deviation = trained.mean(axis=0), trained.std(axis=0)
        series = ((table.values - mean) / deviation).astype(np.float32)
    if (constant := deviation <= 1e-12 * np.abs(mean)).any():
        named = ", ".join(repr(name) for name, same in zip(table.names, constant, strict=True) if same)
        raise ValueError(f"{named} never changes in the {borders.train} rows for training; leave it out.")
    if (wild := ~np.isfinite(deviation) | ~np.isfinite(series).all(axis=0)).any():
        column = int(wild.argmax())
        largest = f"{table.names[column]!r} holds {np.abs(table.values[:, column]).max():.3g}"
        raise ValueError(f"{largest}; in deviations of the rows for training it is not finite.")
    times = time_marks(table.dates) if marks and table.dates is not None else None
    ends = np.cumsum(borders)
    cut = lambda x, a, b: None if x is None else x[a:b]
    part = lambda a, b: Windows(series[a:b], cut(times, a, b), lookback, horizon)
    train, validation, test = (part(max(0, end - n - lookback), end) for n, end in zip(borders, ends, strict=True))
    latest = {"inputs": series[None, -lookback:]} | ({} if times is None else {"marks": times[None, -lookback:]})
    return Series(train, validation, test, mean, deviation, table.names, latest, table.dates)


def write_forecast(path: str | Path, scaled: np.ndarray, series: Series) -> None:
    """A CSV table of the steps after the last row of a series, given as `S V` in its deviations, in its own units.

    The first column is `date`, going on as the table's do, in UTC where these had an offset; without dates it is
    `step`, from 1.

    Raises:
      ValueError: the forecast has other variates than the series, or is not finite.
    """
    if scaled.ndim != 2 or scaled.shape[1] != len(series.names):
        raise ValueError(f"scaled has shape {scaled.shape}; a forecast is (steps, {len(series.names)}).")
    if not np.isfinite(scaled).all():
        raise ValueError("scaled is not finite: this forecast diverged.")
    values = np.float64(scaled) * series.deviation + series.mean
    # To a ten-thousandth of a deviation: of a high level that moves little six digits would tell nothing.
    places = np.clip(4 - np.floor(np.log10(series.deviation)), 0, 300).astype(int)
    ahead = None if series.dates is None else dates_ahead(series.dates, len(values))
    times = range(1, len(values) + 1) if ahead is None else map(str, ahead.tolist())
    with atomically(Path(path)) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("step" if ahead is None else "date", *series.names))
        rows.writerows(
            (time, *(f"{round(x, n):.15g}" for x, n in zip(row, places, strict=True)))
            for time, row in zip(times, values, strict=True)
        )
