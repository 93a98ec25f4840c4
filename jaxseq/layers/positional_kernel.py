"""Convolution kernels as functions of the lag."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ..shapes import Array, Float, typed
from .projection import Dense


class PositionalKernel(nn.Module):
    """h(s) = window(s) ⊙ FFN(PosEmb(s)), one value a channel at each lag s (Hyena, arXiv 2302.10866, section 3.3).

    PosEmb is s and waves of `bands` frequencies; the FFN has sines as activations, sin(ω ·) with ω = `frequency`; the
    window decays as exp(−α |s|), to a hundredth within 0.3 of the span in the first channel and 1.5 in the last. Lags
    are in tokens, and in PosEmb and window in spans. Values start so small that all lags together have variance 1.
    At least float32 throughout: a sine of large numbers forgives no rounding.
    """

    features: int
    hidden: int = 64
    bands: int = 8
    frequency: float = 10.0
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, lags: Float[Array, "L"], span: int) -> Float[Array, "L D"]:
        lags = (lags / span)[:, None]
        waves = 2 * np.pi * lags * jnp.arange(1, self.bands + 1, dtype=lags.dtype)[None]
        x = jnp.concatenate([lags, jnp.cos(waves), jnp.sin(waves)], axis=-1)
        dense = lambda width, name: Dense(width, param_dtype=self.param_dtype, name=name)
        for i in range(2):
            x = jnp.sin(self.frequency * dense(self.hidden, f"hidden_{i}")(x))
        rates = -np.log(0.01) / np.linspace(0.3, 1.5, self.features)
        window = jnp.exp(-jnp.abs(lags) * jnp.asarray(rates, lags.dtype)[None])
        x = dense(self.features, "out")(x)
        return window.astype(x.dtype) * x / len(lags) ** 0.5
