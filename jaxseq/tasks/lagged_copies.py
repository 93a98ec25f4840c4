"""Series that follow one another at a distance: what one variate will do, another has done."""

import jax
import jax.numpy as jnp
import numpy as np

from ..shapes import Array, Float, typed

#: How much of its parent is in a copy.
SHARE = 0.9


def lagged_copies(
    seed: int,
    length: int,
    *,
    num_series: int = 32,
    num_roots: int = 4,
    max_delay: int = 24,
    persistence: float = 0.8,
    noise: float = 0.3,
) -> np.ndarray:
    """`length num_series` float64: a forest of delayed copies.

        root: x_t = persistence x_{t-1} + √(1 − persistence²) ε_t
        any other: x_t = 0.9 p_{t-d} + noise ε_t        of a parent p and a delay d, drawn once, 1 ≤ d ≤ max_delay

    A parent comes before its copies, so that there is no circle. With ε standard normal a model of one series at a time
    sees none of what is to come; one of all sees much of the next `max_delay` steps.

    Raises:
      ValueError: a number is below 1, there are more roots than series, or `persistence` is outside [0, 1).
    """
    if not 0 <= persistence < 1:
        raise ValueError(f"persistence={persistence}; lagged_copies takes 0 or more and below 1.")
    steps, parents, delays = _drawn(seed, length, num_series, num_roots, max_delay)
    x = np.zeros_like(steps)
    x[0, :num_roots] = steps[0, :num_roots]
    for t in range(1, len(x)):
        x[t, :num_roots] = persistence * x[t - 1, :num_roots] + (1 - persistence**2) ** 0.5 * steps[t, :num_roots]
    for n in range(num_roots, num_series):
        x[delays[n] :, n] = SHARE * x[: -delays[n], parents[n]]
        x[:, n] += noise * steps[:, n]
    return x[-length:]


@typed
def lagged_copies_forecast(
    x: Float[Array, "B L V"],
    horizon: int,
    *,
    seed: int,
    length: int,
    num_roots: int = 4,
    max_delay: int = 24,
    persistence: float = 0.8,
) -> Float[Array, "B S V"]:
    """What windows of `lagged_copies` of these numbers are expected to become, by one who knows parents and delays.

        root: E x_t = persistence E x_{t-1}        any other: E x_t = 0.9 E p_{t-d}

    where E of what is seen is itself, and of what came before zero. No forecast from `max_delay` steps or more has a
    smaller squared error on average.

    Raises:
      ValueError: a number is below 1, or there are more roots than series.
    """
    _, parents, delays = _drawn(seed, length, x.shape[2], num_roots, max_delay)
    share = jnp.asarray(np.where(np.arange(x.shape[2]) < num_roots, persistence, SHARE), x.dtype)
    expected = lambda t, path: path.at[:, t].set(share[None] * path[:, t - delays, parents])
    path = jnp.pad(x, ((0, 0), (max_delay, horizon), (0, 0)))
    now = path.shape[1] - horizon
    return jax.lax.fori_loop(now, path.shape[1], expected, path)[:, now:]


def _drawn(seed: int, length: int, num_series: int, num_roots: int, max_delay: int):
    """ε, with steps before the first in which every copy gets a past; of each series the parent, a root's itself, and
    the delay."""
    for name, value in dict(length=length, num_series=num_series, num_roots=num_roots, max_delay=max_delay).items():
        if value < 1:
            raise ValueError(f"{name}={value}; lagged_copies takes 1 or more.")
    if num_roots > num_series:
        raise ValueError(f"num_roots={num_roots} must be at most num_series={num_series}.")
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal((max_delay * num_series + length, num_series))
    links = [(n, 1) if n < num_roots else (rng.integers(n), rng.integers(1, max_delay + 1)) for n in range(num_series)]
    return steps, *np.array(links).T
