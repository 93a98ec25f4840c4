"""The feed-forward layer of the first transformers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..shapes import Array, Float, typed
from .projection import fan_in_projection


class MLP(nn.Module):
    """y = φ(x W_up + b_up) W_down + b_down (arXiv 1706.03762, eq. 2), φ the exact GELU.

    `hidden` is 4 d_model when None. Where there is an rng "dropout", a share of the channels is dropped after each map.
    """

    d_model: int
    hidden: int | None = None
    activation: Callable = partial(nn.gelu, approximate=False)
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        hidden = self.hidden or 4 * self.d_model
        dropped = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        x = dropped(self.activation(fan_in_projection(hidden, "up_proj", self, self.d_model)(x)))
        return dropped(fan_in_projection(self.d_model, "down_proj", self, hidden)(x))
