"""Series with anomalies marked: the Numenta benchmark, server machines, all but one class of a labelled set."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .dates import time_of
from .labelled import Labelled
from .labelled_series import labelled_series
from .scale import deviations
from .table import Table, archive_text, read_table

#: What the Numenta benchmark leaves unscored at the start of a series: a share of the rows, and so many at most.
PROBATION = 0.15, 750


class Recording(NamedTuple):
    """A series in three parts, one after the other, in units of the deviation of the first.

    A model is trained on rows up to `fitted`, thresholds are set on those from there to `calibrated`, and the rest is
    the test. A part may be empty.
    """

    name: str
    values: np.ndarray  # T V float32
    anomalous: np.ndarray  # T bool
    fitted: int
    calibrated: int
    dates: np.ndarray | None  # T datetime64[us]


def nab_recordings(
    folder: str | os.PathLike[str], *, only: str = "", labels: str = "combined_windows.json", missing: str = "raise"
) -> list[Recording]:
    """The series of the Numenta Anomaly Benchmark that a file of `labels` names, with its windows of time.

    Those with `only` in their names, as "realTweets", where it is given.

    Values that are `missing` raise, or take the last one before them ("forward"), as in `read_table`.

    The folder is that of a release, with `data` and `labels` in it, or holds both kinds of files itself; series may be
    gzipped. The first 15 % of a series, 750 rows at most, are not scored: there is no anomaly in them by design. Two
    thirds of these are to train on, the last third is to calibrate.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: no name has `only` in it; a file is no table of `timestamp` and `value`, or no JSON of windows; a
        window begins after its end, holds no row, or begins in the rows that are not scored.
    """
    folder = Path(folder).expanduser()
    path = _existing(folder / "labels" / labels, folder / labels)
    recordings, windows_of = [], _windows(path)
    for name in _chosen(list(windows_of), only):
        windows = windows_of[name]
        file = _existing(*(at / f"{name}{zipped}" for at in (folder / "data", folder) for zipped in ("", ".gz")))
        # Clocks were set back in some of the series, and rows are missing in others.
        table = read_table(file, date="timestamp", missing=missing, unordered="keep", uneven="keep")
        if table.dates is None or table.names != ("value",):
            raise ValueError(f"{file} has columns {', '.join(table.names)}; its header has to be timestamp,value.")
        probation = min(int(PROBATION[0] * table.length), PROBATION[1])
        anomalous = np.zeros(table.length, bool)
        for start, end in windows:
            inside = (table.dates >= start) & (table.dates <= end)
            if not inside[probation:].any() or inside[:probation].any():
                raise ValueError(
                    f"{path}: the window {start.item()} to {end.item()} of {name} has to hold rows after "
                    f"the first {probation}, and none of these."
                )
            anomalous |= inside
        recordings.append(_scaled(name, table, anomalous, 2 * probation // 3, probation))
    return recordings


def smd_recordings(folder: str | os.PathLike[str], *, only: str = "", calibrate: float = 0.2) -> list[Recording]:
    """The machines of the Server Machine Dataset: `train`, `test` and `test_label` hold a file of each, `NAME.txt`.

    Those with `only` in their names, as "machine-1-", where it is given. Rows are numbers between commas, a row of
    labels is 0 or 1. The last share `calibrate` of the rows in `train` is to calibrate. Training rows have no labels,
    and are taken as normal.

    Raises:
      FileNotFoundError: a file is missing, or there is none.
      ValueError: no name has `only` in it, a file is no such table, or those of a machine disagree.
    """
    folder = Path(folder).expanduser()
    if not 0 < calibrate < 1:
        raise ValueError(f"calibrate={calibrate}; a share is above 0 and below 1.")
    names = sorted(path.name for path in (folder / "train").glob("*.txt"))
    if not names:
        raise FileNotFoundError(f"{folder / 'train'} holds no machine, a file NAME.txt.")
    recordings = []
    for name in _chosen(names, only):
        train, test, marks = (
            read_table(_existing(folder / part / name)).values for part in ("train", "test", "test_label")
        )
        if marks.shape != (len(test), 1) or not np.isin(marks, (0, 1)).all():
            raise ValueError(f"{folder / 'test_label' / name} has to hold a 0 or 1 for each of {len(test)} rows.")
        if test.shape[1] != train.shape[1]:
            raise ValueError(f"{folder / 'test' / name} has {test.shape[1]} columns, and {train.shape[1]} to train on.")
        anomalous = np.concatenate([np.zeros(len(train), bool), marks[:, 0] == 1])
        table = Table(np.concatenate([train, test]), tuple(map(str, range(train.shape[1]))), None)
        fitted = int((1 - calibrate) * len(train))
        recordings.append(_scaled(name.removesuffix(".txt"), table, anomalous, fitted, len(train)))
    return recordings


def one_class_recordings(
    folder: str | os.PathLike[str], name: str, normal: str, *, calibrate: float = 1 / 3, seed: int = 0
) -> list[Recording]:
    """The series of a labelled set, where all but those of the class `normal` are anomalies from end to end.

    Of the normal series of `NAME_TRAIN` a share to `calibrate`, drawn by `seed`, is kept from training; the other
    classes there are left out. The test is that of `labelled_series`. Scales are of the series to train on.

    Raises:
      FileNotFoundError, ValueError: as `labelled_series` does; there is no class `normal`, or too few series of it.
    """
    train, test, classes = labelled_series(folder, name, seed=seed)
    if normal not in classes:
        raise ValueError(f"normal={normal!r} is no class of {name}; choose {', '.join(classes)}.")
    label = classes.index(normal)
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(train.labels == label))
    cut = round(calibrate * len(rows))
    if not 0 < cut < len(rows):
        raise ValueError(f"calibrate={calibrate} of the {len(rows)} series of class {normal} leaves a part empty.")
    series = lambda part: [inputs[:length] for inputs, length in zip(part.inputs, part.lengths, strict=True)]
    learned = np.concatenate([series(train)[row] for row in rows[cut:]])
    mean, deviation = learned.mean(axis=0), deviations(learned, name)

    def recording(part: Labelled, row: int, place: str) -> Recording:
        values = (series(part)[row] - mean) / deviation
        rows_to = lambda *places: len(values) if place in places else 0
        anomalous = np.full(len(values), part.labels[row] != label)
        return Recording(f"{place} {row}", values, anomalous, rows_to("fit"), rows_to("fit", "calibrate"), None)

    return (
        [recording(train, row, "fit") for row in rows[cut:]]
        + [recording(train, row, "calibrate") for row in rows[:cut]]
        + [recording(test, row, "test") for row in range(len(test.labels))]
    )


def _scaled(name: str, table: Table, anomalous: np.ndarray, fitted: int, calibrated: int) -> Recording:
    if not 0 < fitted < calibrated:
        raise ValueError(f"{name} has {table.length} rows, too few to train on and to calibrate.")
    trained = table.values[:fitted]
    scale = deviations(trained, name)
    values = ((table.values - trained.mean(axis=0)) / scale).astype(np.float32)
    return Recording(name, values, anomalous, fitted, calibrated, table.dates)


def _chosen(names: list[str], only: str) -> list[str]:
    if not (chosen := [name for name in names if only in name]):
        raise ValueError(f"only={only!r} is in none of {len(names)} names, of which {names[0]!r} is one.")
    return chosen


def _existing(*paths: Path) -> Path:
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{paths[0]} does not exist.")


def _windows(path: Path) -> dict[str, list[tuple[np.datetime64, np.datetime64]]]:
    try:
        content = json.loads(archive_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from None
    lists = isinstance(content, dict) and all(isinstance(windows, list) for windows in content.values())
    if not lists or not content:
        raise ValueError(f"{path} holds no windows: an object of lists of start and end, by the name of a series.")
    return {name: [_window(path, name, window) for window in windows] for name, windows in content.items()}


def _window(path: Path, name: str, window) -> tuple[np.datetime64, np.datetime64]:
    try:
        start, end = (np.datetime64(time_of(time), "us") for time in window)
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{path}: {window!r} of {name} is no pair of times as 2016-07-01 00:00:00.") from None
    if start > end:
        raise ValueError(f"{path}: a window of {name} begins at {start.item()} and ends at {end.item()}.")
    return start, end
