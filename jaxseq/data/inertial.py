"""Inertial recordings beside a tracked position: CSV tables of the EuRoC MAV format."""

import csv
import io
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .table import Table, archive_text, number

#: Where a release has its tables, and where a folder of two files has them.
IMU = ("mav0/imu0/data.csv", "imu0/data.csv", "imu0_data.csv")
POSITION = tuple(
    f"{before}{tracker}{after}"
    for tracker in ("leica0", "vicon0", "state_groundtruth_estimate0")
    for before, after in (("mav0/", "/data.csv"), ("", "/data.csv"), ("", "_data.csv"))
)


class Motion(NamedTuple):
    """A recording cut into chunks of `k` samples."""

    inputs: np.ndarray  # n k F float32: rates of turn (rad/s), accelerations (m/s²), and their first differences
    targets: np.ndarray  # n 3 float32: m moved from the chunk's first sample to the next chunk's; NaN where not known
    seconds: np.ndarray  # n float64: the time of the chunk's first sample
    skipped: int  # rows that hold no numbers
    names: tuple[str, ...]  # of the F channels, as the table has them


def inertial_recordings(folder: str | os.PathLike[str]) -> list[Path]:
    """The folder, if it holds a recording, or those in it that do, by name, as a release of many flights has them.

    Raises:
      FileNotFoundError: neither it nor any in it holds one.
    """
    folder = Path(folder).expanduser()
    inside = sorted(path for path in folder.glob("*") if path.is_dir())
    if _path_of(folder, IMU):
        return [folder]
    if not (found := [path for path in inside if _path_of(path, IMU)]):
        raise FileNotFoundError(f"{folder} and its folders hold none of {', '.join(IMU)}, nor one with .gz behind.")
    return found


def inertial_motion(folder: str | os.PathLike[str], *, chunk: int = 10, largest_gap: float = 0.2) -> Motion:
    """Chunks of a recording, and how far it moved in each: of two tables in a folder, which may be gzipped.

    They are imu0, and the first that there is of leica0, vicon0 and state_groundtruth_estimate0, whose second to fourth
    columns are positions in m: rooms have one tracker or another.

    Positions are interpolated between the two measurements around a time, if these are no more than `largest_gap`
    seconds apart. Rows without numbers, as the remarks some copies end with, are skipped and counted.

    Raises:
      FileNotFoundError: a table is missing.
      ValueError: a table is damaged, has other columns, repeats a time or holds a number that is not finite; samples
        are missing, a channel never changes, or `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; choose 1 or more samples.")
    folder = Path(folder).expanduser()
    (imu, names, skipped), (position, _, more) = _table(folder, IMU, 7), _table(folder, POSITION, 4)
    position[:, 0], imu[:, 0] = position[:, 0] - imu[0, 0], imu[:, 0] - imu[0, 0]
    steps = np.diff(imu[:, 0])
    if len(imu) <= chunk or steps.max() > 1.5 * np.median(steps):
        raise ValueError(f"{folder} misses samples: {len(imu)} of them, {steps.max(initial=0):.3f} s apart at most.")
    sensors = imu[:, 1:]
    if (same := (sensors == sensors[:1]).all(axis=0)).any():
        raise ValueError(
            f"{_found(folder, IMU)}: {names[1 + int(same.argmax())]!r} never changes; is the sensor broken?"
        )
    sensors = np.concatenate([sensors, np.diff(sensors, axis=0, prepend=sensors[:1])], axis=1)
    borders = np.arange(0, len(imu), chunk)
    at = np.stack(
        [_known(imu[borders, 0], position[:, 0], column, largest_gap) for column in position[:, 1:].T], axis=1
    )
    number = len(borders) - 1
    inputs = sensors[: number * chunk].reshape(number, chunk, -1)
    targets, seconds = np.diff(at, axis=0).astype(np.float32), imu[borders[:-1], 0]
    names = (*names[1:], *(f"step of {name}" for name in names[1:]))
    return Motion(inputs.astype(np.float32), targets, seconds, skipped + more, names)


def foretold_readings(table: Table, *, chunk: int = 10) -> Motion:
    """Chunks of a sensor's readings, and by how much the mean of each channel changes to the next chunk.

    As `inertial_motion`, with each channel of the table and its first differences as inputs; targets `n V` are in the
    units of the channels. To guess 0 is to say that the next chunk is as this one.

    Raises:
      ValueError: the table has no times, or fewer rows than two chunks; or `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; choose 1 or more samples.")
    if table.dates is None:
        raise ValueError("the table has no column of times, by which it is cut into parts.")
    if (whole := table.length // chunk) < 2:
        raise ValueError(f"the table has {table.length} rows; two chunks of {chunk} or more are needed.")
    steps = np.diff(table.values, axis=0, prepend=table.values[:1])
    inputs = np.concatenate([table.values, steps], axis=1)[: whole * chunk].reshape(whole, chunk, -1)
    means = inputs[..., : len(table.names)].mean(axis=1)
    seconds = (table.dates - table.dates[0])[::chunk] / np.timedelta64(1, "s")
    names = (*table.names, *(f"step of {name}" for name in table.names))
    targets = np.diff(means, axis=0).astype(np.float32)
    return Motion(inputs[:-1].astype(np.float32), targets, seconds[: whole - 1], 0, names)


def _known(times: np.ndarray, measured: np.ndarray, values: np.ndarray, largest_gap: float) -> np.ndarray:
    """Linear between two measurements, NaN where these are too far apart or on one side alone."""
    before, after = np.searchsorted(measured, times, "right") - 1, np.searchsorted(measured, times)
    inside = (before >= 0) & (after < len(measured))
    gaps = measured[np.minimum(after, len(measured) - 1)] - measured[np.maximum(before, 0)]
    return np.where(inside & (gaps <= largest_gap), np.interp(times, measured, values), np.nan)


def _path_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    paths = (folder / f"{name}{end}" for name in names for end in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _found(folder: Path, names: tuple[str, ...]) -> Path:
    if (path := _path_of(folder, names)) is None:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}, nor one with .gz behind.")
    return path


def _table(folder: Path, files: tuple[str, ...], columns: int) -> tuple[np.ndarray, tuple[str, ...], int]:
    """Rows by time, in seconds; the names of the columns; and how many rows held no numbers."""
    path = _found(folder, files)
    try:
        reader = csv.reader(io.StringIO(archive_text(path), newline=""))
        header = next(reader, [])
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV table ({error}).") from None
    numbers = [(line, row[:columns]) for line, cells in rows if len(row := _numbers(cells)) >= columns]
    if len(numbers) < 2:
        raise ValueError(f"{path} has {len(numbers)} rows of {columns} numbers; a recording takes two.")
    names = tuple(name.strip() for name in header[:columns])
    names += tuple(f"column {n + 1}" for n in range(len(names), columns))
    for line, row in numbers:
        if wrong := [name for name, value in zip(names, row, strict=True) if not math.isfinite(value)]:
            raise ValueError(f"{path}, line {line}: {wrong[0]!r} is missing or not finite.")
    table = np.asarray([row for _, row in numbers])
    table = table[np.argsort(table[:, 0], kind="stable")]
    table[:, 0] *= 1e-9
    if (np.diff(table[:, 0]) <= 0).any():
        raise ValueError(f"{path} has a time twice.")
    return table, names, len(rows) - len(numbers)


def _numbers(row: list[str]) -> list[float]:
    """A number for each cell; none where an empty cell or a word is among them."""
    try:
        return [number(cell) for cell in row] if all(cell.strip() for cell in row) else []
    except ValueError:
        return []
