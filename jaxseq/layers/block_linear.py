"""A linear map inside each block of channels, none between them."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..shapes import Array, Float, typed


class BlockLinear(nn.Module):
    """y = x diag(W_1, …, W_n) + b: one weight matrix for each of `num_blocks` runs of channels."""

    num_blocks: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.variance_scaling(
        1, "fan_in", "normal", in_axis=-2, out_axis=-1, batch_axis=0
    )

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width = x.shape[-1] // self.num_blocks
        kernel = self.param("kernel", self.kernel_init, (self.num_blocks, width, width), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.einsum("btni,nij->btnj", x.reshape(*x.shape[:2], self.num_blocks, width), kernel).reshape(x.shape)
        return y if bias is None else y + bias[None, None]
