"""Long filters: one tap a lag and channel, learned one by one or as a function of the lag.

A filter is called without arguments and returns its taps as a function of how many lags are asked for: a decoder asks
for few.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ..ops.online_convolution import Taps, cut
from ..shapes import Array, Float, accumulator
from .initialisers import symmetric_uniform


def positions(count: int, length: int, bands: int) -> np.ndarray:
    """Rows t = n / (L − 1), then cos and −sin of 2π f n / L for f from 10⁻⁴ to bands − 1."""
    n = np.arange(count)[:, None]
    angle = 2 * np.pi * n / length * np.linspace(1e-4, bands - 1, bands)[None]
    return np.concatenate([n / max(1, length - 1), np.cos(angle), -np.sin(angle)], axis=1)


class ExplicitFilter(nn.Module):
    """A parameter for each of L lags, N(0, 1/L). With `squash` λ its taps are sign(k) max(|k| − λ, 0) (2302.06646)."""

    features: int
    length: int
    squash: float = 0.0
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Taps:
        kernel = self.param(
            "kernel", nn.initializers.normal(self.length**-0.5), (self.length, self.features), self.param_dtype
        )
        squashed = lambda k: jnp.sign(k) * jnp.maximum(jnp.abs(k) - self.squash, 0) if self.squash else k
        return cut(lambda count: squashed(kernel[:count]), self.length)


class ImplicitFilter(nn.Module):
    """k(n) = window(n) ⊙ FFN(PosEmb(n)): Hyena's (arXiv 2302.10866, section 3.3), or without window BaseConv's.

    The FFN has `depth` hidden layers; with `sine` their activations are sin(ω ⊙ ·), ω learned and the last map without
    bias, else they are ReLU. The window is e^{−|δ_d| t} with δ from ln 0.01 / 1.5 to ln 0.01 / 0.3 over the channels.
    At least float32 throughout: a sine of large numbers forgives no rounding.
    """

    features: int
    length: int
    hidden: int = 64
    depth: int = 3
    bands: int = 1
    sine: bool = True
    frequency: float = 1.0
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Taps:
        widths = [1 + 2 * self.bands] + [self.hidden] * self.depth + [self.features]
        layers, dtype = [], accumulator(self.param_dtype)
        for n, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            uniform = symmetric_uniform(before**-0.5)
            last = n == self.depth
            layer = {"kernel": self.param(f"kernel_{n}", uniform, (before, after), self.param_dtype)}
            if not (last and self.sine):
                layer["bias"] = self.param(f"bias_{n}", uniform, (after,), self.param_dtype)
            if self.sine and not last:
                start = nn.initializers.constant(self.frequency)
                layer["frequency"] = self.param(f"frequency_{n}", start, (after,), self.param_dtype)
            layers.append({name: a.astype(dtype) for name, a in layer.items()})

        def taps(count: int):
            x = jnp.asarray(positions(count, self.length, self.bands), dtype)
            k = feed_forward(layers, x)
            if not self.sine:
                return k
            rates = -np.linspace(np.log(0.01) / 1.5, np.log(0.01) / 0.3, self.features)
            return k * jnp.exp(-x[:, :1] * jnp.asarray(rates, dtype)[None])

        return cut(taps, self.length)


def feed_forward(layers: list[dict[str, Array]], x: Float[Array, "L E"]) -> Float[Array, "L D"]:
    for layer in layers:
        x = x @ layer["kernel"] + (layer["bias"][None] if "bias" in layer else 0)
        if layer is not layers[-1]:
            x = jnp.sin(layer["frequency"][None] * x) if "frequency" in layer else nn.relu(x)
    return x
