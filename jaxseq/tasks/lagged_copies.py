"""Series that follow one another at a distance: what one variate will do, another has done."""

import numpy as np


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
    for name, value in dict(length=length, num_series=num_series, num_roots=num_roots, max_delay=max_delay).items():
        if value < 1:
            raise ValueError(f"{name}={value}; lagged_copies takes 1 or more.")
    if num_roots > num_series:
        raise ValueError(f"num_roots={num_roots} must be at most num_series={num_series}.")
    if not 0 <= persistence < 1:
        raise ValueError(f"persistence={persistence}; lagged_copies takes 0 or more and below 1.")
    rng = np.random.default_rng(seed)
    before = max_delay * num_series  # steps in which every copy gets a past
    steps = rng.standard_normal((before + length, num_series))
    x = np.zeros_like(steps)
    x[0, :num_roots] = steps[0, :num_roots]
    for t in range(1, len(x)):
        x[t, :num_roots] = persistence * x[t - 1, :num_roots] + (1 - persistence**2) ** 0.5 * steps[t, :num_roots]
    for n in range(num_roots, num_series):
        parent, delay = rng.integers(n), rng.integers(1, max_delay + 1)
        x[delay:, n] = 0.9 * x[:-delay, parent]
        x[:, n] += noise * steps[:, n]
    return x[before:]
