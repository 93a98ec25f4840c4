"""Scores of the rows of recordings by rules that train nothing: what forecasters have to beat.

A rule takes recordings and how many rows it sees, and gives a score for every row, NaN where it has none.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from ..data import Recording


def last_value(recordings: Sequence[Recording], lookback: int) -> list[np.ndarray]:
    """How far from the value before."""
    ahead = lambda x: np.concatenate([x[:1], x[:-1]])
    return [np.mean((r.values - ahead(r.values)) ** 2, axis=1) for r in recordings]


def moving_z_score(recordings: Sequence[Recording], lookback: int) -> list[np.ndarray]:
    """How many deviations from the mean of the window before."""

    def score(values):
        windows = np.lib.stride_tricks.sliding_window_view(values.astype(float), lookback, axis=0)[:-1]
        squares = (values[lookback:] - windows.mean(axis=-1)) ** 2 / (windows.var(axis=-1) + 1e-5)
        return np.concatenate([np.full(lookback, np.nan), squares.mean(axis=1)])

    return [score(recording.values) for recording in recordings]


def a_day_before(recordings: Sequence[Recording], lookback: int) -> list[np.ndarray]:
    """How far from the last value a day ago or more, from the value before where there is none."""

    def score(r: Recording) -> np.ndarray:
        assert r.dates is not None
        times = np.maximum.accumulate(r.dates)  # clocks were set back in some
        place = np.searchsorted(times, times - np.timedelta64(1, "D"), side="right") - 1
        before = np.where(place < 0, np.maximum(np.arange(len(times)) - 1, 0), place)
        return np.mean((r.values - r.values[before]) ** 2, axis=1)

    return [score(recording) for recording in recordings]


def mean_series(recordings: Sequence[Recording], lookback: int) -> list[np.ndarray]:
    """How far from the mean, at the same row, of the series to train on."""
    mean = lambda length: np.mean([r.values[:length] for r in recordings if r.fitted >= length], axis=0)
    return [np.mean((r.values - mean(len(r.values))) ** 2, axis=1) for r in recordings]


def nearest_window(recordings: Sequence[Recording], lookback: int) -> list[np.ndarray]:
    """How far the window that a row ends is from the nearest one to train on, of the same recording if it has any."""

    def flat(values):
        view = np.lib.stride_tricks.sliding_window_view(values, lookback, axis=0)
        return view.reshape(len(view), -1)

    series = [flat(r.values) for r in recordings if r.fitted == len(r.values)]
    shared = np.concatenate(series) if series else None

    def score(r: Recording) -> np.ndarray:
        windows = flat(r.values)
        known = flat(r.values[: r.fitted]) if shared is None else shared
        size = np.sum(known**2, axis=1)
        least = [np.min(size - 2 * part @ known.T, axis=1) for part in np.array_split(windows, 1 + len(windows) // 512)]
        squares = np.maximum(np.concatenate(least) + np.sum(windows**2, axis=1), 0) / windows.shape[1]
        return np.concatenate([np.full(lookback - 1, np.nan), squares])

    return [score(recording) for recording in recordings]


ANOMALY_RULES: dict[str, Callable[[Sequence[Recording], int], list[Float[np.ndarray, " T"]]]] = {
    "last value": last_value,
    "moving z-score": moving_z_score,
    "a day before": a_day_before,
    "mean series": mean_series,
    "nearest window": nearest_window,
}


def anomaly_rules(recordings: Sequence[Recording]) -> list[str]:
    """Those that apply: days need dates, and a mean of series needs whole series to train on."""
    dated = all(r.dates is not None for r in recordings)
    whole = any(r.fitted == len(r.values) for r in recordings)
    return [name for name in ANOMALY_RULES if (name != "a day before" or dated) and (name != "mean series" or whole)]
