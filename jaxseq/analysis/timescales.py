"""How long activity remembers: the decay of its autocorrelation (arXiv 2309.12927, section 2)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq, curve_fit

MODELS = ("single", "double", "best")


class Timescale(NamedTuple):
    """Of c e^{−k/τ}, or of the sum of two such."""

    tau: float  # steps in which the fit falls to 1/e
    taus: tuple[float, ...]
    shares: tuple[float, ...]
    aic: float  # Akaike's criterion: less is better


def autocorrelation(activity: Float[np.ndarray, "*B T"], max_lag: int) -> Float[np.ndarray, " L"]:
    """At lags 0 to `max_lag`, over all rows, each less its mean; unbiased in the number of pairs, 1 at lag 0.

    Raises:
      ValueError: `max_lag` is not from 1 to T − 1, or a row is constant or not finite.
    """
    rows = np.asarray(activity, np.float64).reshape(-1, np.shape(activity)[-1])
    length = rows.shape[1]
    if not 1 <= max_lag < length:
        raise ValueError(f"max_lag={max_lag}; of {length} steps it is 1 to {length - 1}.")
    rows = rows - rows.mean(axis=1, keepdims=True)
    power = np.mean(rows**2, axis=1)
    if not (np.isfinite(power).all() and (power > 0).all()):
        raise ValueError("activity has a row that is constant or not finite; it has no autocorrelation.")
    spectrum = np.abs(np.fft.rfft(rows, 2 * length, axis=1)) ** 2
    products = np.fft.irfft(spectrum, axis=1)[:, : max_lag + 1] / (length - np.arange(max_lag + 1))
    return np.mean(products / power[:, None], axis=0)


def autocorrelation_timescale(
    activity: Float[np.ndarray, "*B T"], max_lag: int, *, model: str = "best", least_lag: int = 0
) -> Timescale:
    """The time in which the autocorrelation decays, by least squares over lags `least_lag` to `max_lag`.

        "single"  c e^{−k/τ}        "double"  c_1 e^{−k/τ_1} + c_2 e^{−k/τ_2}        "best"  of the lesser AIC, c ≥ 0

    A `least_lag` of 1 leaves out what noise of each step adds at lag 0.

    Raises:
      ValueError: as `autocorrelation`; `model` is unknown, or there are fewer lags than numbers to fit.
      RuntimeError: no fit is found.
    """
    if model not in MODELS:
        raise ValueError(f"model={model!r}; choose one of {', '.join(MODELS)}.")
    numbers = 2 if model == "single" else 4
    if not 0 <= least_lag <= max_lag - numbers:
        raise ValueError(f"least_lag={least_lag} to max_lag={max_lag} are too few lags for {numbers} numbers.")
    lags = np.arange(least_lag, max_lag + 1, dtype=float)
    values = autocorrelation(activity, max_lag)[least_lag:]
    single = _fitted(lags, values, 1)
    if model == "single":
        return single
    double = _fitted(lags, values, 2)
    return double if model == "double" or double.aic < single.aic else single


def _fitted(lags: np.ndarray, values: np.ndarray, terms: int) -> Timescale:
    span = lags[-1] - lags[0]
    decays = lambda k, *p: sum(c * np.exp(-k / tau) for c, tau in zip(p[:terms], p[terms:], strict=True))
    # Where the logs of positive values first fall by one; two terms start from either side of it.
    first = next((k for k, v in zip(lags, values, strict=True) if v < values[0] / np.e), span)
    start = [values[0] / terms] * terms + [
        max(first, 0.5) * factor for factor in ((1.0,) if terms == 1 else (0.3, 3.0))
    ]
    bounds = ([0.0] * terms + [1e-2] * terms, [2.0] * terms + [100 * span] * terms)
    found, _ = curve_fit(decays, lags, values, np.clip(start, *bounds), bounds=bounds, maxfev=20_000)
    errors = np.sum((decays(lags, *found) - values) ** 2)
    aic = len(lags) * np.log(max(errors, 1e-300) / len(lags)) + 2 * len(found)
    order = np.argsort(found[terms:])
    shares, taus = found[:terms][order], found[terms:][order]
    fallen = lambda k: float(decays(k, *found) - shares.sum() / np.e)
    tau = (
        taus[0]
        if taus[0] == taus[-1] or shares.sum() <= 0
        else brentq(fallen, taus[0] * (1 - 1e-9), taus[-1] * (1 + 1e-9))
    )
    return Timescale(float(tau), tuple(map(float, taus)), tuple(map(float, shares)), float(aic))
