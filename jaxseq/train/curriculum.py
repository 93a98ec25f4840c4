"""Tasks of rising level, a readout each: which are trained together, and when the next one is."""

from dataclasses import dataclass

import jax.numpy as jnp

from ..shapes import Array, Bool, Float, Int


@dataclass(frozen=True)
class Curriculum:
    """Levels `first` to `last`, one after the other, with the `window` − 1 before it (arXiv 2309.12927, section 2).

    All before it where `window` is None (the paper's multi-head), none where it is 1 (single-head). A level is
    mastered where its accuracy, and the mean of those trained with it, are above `threshold`; then the next one is
    trained, and the lowest of the window no more. A level above `last` stands for all being mastered. Methods are pure,
    of arrays or numbers.
    """

    first: int
    last: int
    window: int | None = None
    threshold: float = 0.98

    def __post_init__(self):
        if self.last < self.first:
            raise ValueError(f"first={self.first} is above last={self.last}.")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or None.")
        if not 0.5 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must be above 0.5 and at most 1.")

    @property
    def levels(self) -> range:
        return range(self.first, self.last + 1)

    def trained(self, level: Int[Array, ""] | int) -> Bool[Array, "L"]:
        """Whether each is trained when `level` is the highest; none above `last`."""
        levels = jnp.asarray(self.levels)
        recent = levels > level - (len(self.levels) if self.window is None else self.window)
        return recent & (levels <= level) & (level <= self.last)

    def after(self, level: Int[Array, ""] | int, accuracy: Float[Array, "L"]) -> Int[Array, ""]:
        """The level to go on with, at these accuracies."""
        trained = self.trained(level)
        mean = jnp.sum(jnp.where(trained, accuracy, 0)) / jnp.maximum(trained.sum().astype(accuracy.dtype), 1)
        own = accuracy[jnp.clip(level - self.first, 0, len(self.levels) - 1)]
        return jnp.where(jnp.minimum(mean, own) > self.threshold, level + 1, level)
