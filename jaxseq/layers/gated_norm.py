"""The norm and the gate at the end of a mixer."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..shapes import Array, Float, typed


class GatedRMSNorm(nn.Module):
    """RMSNorm(x ⊙ silu(z)) w, each of `num_groups` runs of channels by itself (Mamba-2, arXiv 2405.21060, section 7).

    With `gate_first` False the gate comes last: (RMSNorm(x) w) ⊙ silu(z).
    """

    num_groups: int = 1
    epsilon: float = 1e-5
    gate_first: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B T D"], z: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width = x.shape[-1]
        if self.num_groups < 1 or width % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} does not divide the {width} channels of x.")
        scale = self.param("scale", nn.initializers.ones, (width,), self.param_dtype)
        x, z, scale = nn.dtypes.promote_dtype(x, z, scale, dtype=self.dtype)
        x = x * nn.silu(z) if self.gate_first else x
        norm = nn.RMSNorm(self.epsilon, use_scale=False, dtype=x.dtype)
        groups = norm(x.reshape(*x.shape[:2], self.num_groups, -1))
        y = groups.reshape(x.shape) * scale[None, None]
        return y if self.gate_first else y * nn.silu(z)
