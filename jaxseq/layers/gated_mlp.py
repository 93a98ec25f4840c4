"""The gated feed-forward layer."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..shapes import Array, Float, typed
from .projection import projection


class GatedMLP(nn.Module):
    """SwiGLU: y = (silu(x W_gate) ⊙ x W_up) W_down (arXiv 2002.05202, eq. 6).

    `hidden` is 8/3 d_model rounded up to a multiple of 64 when None: the parameters of an ungated layer of 4 d_model.
    """

    d_model: int
    hidden: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        hidden = self.width()
        gate = nn.silu(projection(hidden, "gate_proj", self)(x))
        return projection(self.d_model, "down_proj", self)(gate * projection(hidden, "up_proj", self)(x))

    @nn.nowrap
    def width(self) -> int:
        """Channels between."""
        return self.hidden or -(-(8 * self.d_model // 3) // 64) * 64
