"""Normalisation inside each head."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..shapes import accumulator


class HeadNorm(nn.Module):
    """LayerNorm over the channels of each head, `B T H V`, with a scale and a bias for every channel of all heads.

    It is a group norm, one group a head, whose statistics are of one token.
    """

    epsilon: float = 1e-5
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(accumulator(x.dtype))
        parameter = lambda name, start: self.param(name, start, (x.shape[2] * x.shape[3],), self.param_dtype)
        per_head = lambda name, start: parameter(name, start).reshape(x.shape[2:])[None, None].astype(wide.dtype)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.epsilon)
        y = y * per_head("scale", nn.initializers.ones)
        y = y + per_head("bias", nn.initializers.zeros) if self.use_bias else y
        return y.astype(x.dtype if self.dtype is None else self.dtype)
