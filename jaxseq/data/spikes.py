"""Sorted spike trains: a table of spike times as counts in bins."""

import csv
import io
import math
import os
from pathlib import Path

import numpy as np

from .table import plain_text

COLUMNS = ("neuron", "trial", "time_s")


def spike_counts(
    path: str | os.PathLike[str], *, bin_seconds: float, seconds: float | None = None
) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """`(counts, trials, neurons)` of a CSV table `neuron,trial,time_s`, which may be gzipped: int32 `trials T neurons`.

    Names are in natural order. A trial lasts `seconds`, or to the last spike of all where that is None; a last bin that
    is not full is left out.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: the file is no such table, a time is no number of at least 0, or a bin is no time above 0.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a CSV table with the columns {', '.join(COLUMNS)}.")
    if not bin_seconds > 0:
        raise ValueError(f"bin_seconds={bin_seconds} must be above 0.")
    rows = _rows(path)
    neurons = tuple(sorted({neuron for neuron, _, _ in rows}, key=_natural))
    trials = tuple(sorted({trial for _, trial, _ in rows}, key=_natural))
    times = np.asarray([time for _, _, time in rows])
    bins = math.floor((times.max() if seconds is None else seconds) / bin_seconds + 1e-9)
    if bins < 1:
        raise ValueError(f"{path} has no full bin of {bin_seconds} s; choose shorter ones.")
    place = lambda names: {name: i for i, name in enumerate(names)}
    trial_at, neuron_at = place(trials), place(neurons)
    at = np.floor(times / bin_seconds + 1e-9).astype(int)  # 0.3 s begins the bin of 0.3 s, though 0.3 / 0.1 < 3
    index = np.asarray([(trial_at[trial], neuron_at[neuron]) for neuron, trial, _ in rows])
    counts = np.zeros((len(trials), bins, len(neurons)), np.int32)
    inside = at < bins
    np.add.at(counts, (index[inside, 0], at[inside], index[inside, 1]), 1)
    return counts, trials, neurons


def _rows(path: Path) -> list[tuple[str, str, float]]:
    reader = csv.DictReader(io.StringIO(plain_text(path), newline=""))
    try:
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} has no column {missing[0]}; the columns are {', '.join(COLUMNS)}.")
        rows = [(row["neuron"], row["trial"], _time(row["time_s"], path, reader.line_num)) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV table ({error}).") from None
    if not rows:
        raise ValueError(f"{path} holds no spikes.")
    return rows


def _time(text: str | None, path: Path, line: int) -> float:
    try:
        time = float(text or "")
    except ValueError:
        time = math.nan
    if not 0 <= time < math.inf:
        raise ValueError(f"{path}, line {line}: time_s={text!r} is no time of at least 0.")
    return time


def _natural(name: str):
    """2 before 10, numbers before words."""
    return (0, int(name), "") if name.isdigit() else (1, 0, name)
