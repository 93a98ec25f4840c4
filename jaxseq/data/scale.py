"""The scale of what is trained on."""

import numpy as np


def deviations(values: np.ndarray, of: str) -> np.ndarray:
    """Of each column of `T F`; one where it never changes: it may, later on.

    Raises:
      ValueError: one is not finite, as values are too large; `of` says whose they are.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        deviation = values.std(axis=0)
    largest = np.abs(values).max(axis=0)
    if (wild := ~np.isfinite(deviation)).any():
        column = int(wild.argmax())
        raise ValueError(f"{of}: column {column + 1} holds {largest[column]:.3g}; its deviation is not finite.")
    return np.where(deviation <= 1e-7 * np.maximum(1e-30, largest), 1, deviation)
