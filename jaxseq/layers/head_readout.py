"""What heads read, on its way out of a mixer."""

from collections.abc import Callable

import flax.linen as nn
import jax

from .projection import projection


def head_readout(module: nn.Module, o: jax.Array, x: jax.Array, activation: Callable = nn.silu) -> jax.Array:
    """y = (RMSNorm(o) ⊙ activation(x W_g)) W_o of heads o `B T H V`, ungated without the module's `output_gate`.

    The norm is per head, of ε `norm_eps`, with one weight vector for all heads.
    """
    norm = nn.RMSNorm(module.norm_eps, dtype=module.dtype, param_dtype=module.param_dtype, name="norm")
    y = norm(o).reshape(*x.shape[:2], -1)
    if module.output_gate:
        y *= activation(projection(y.shape[-1], "gate_proj", module)(x))
    return projection(module.d_model, "out_proj", module)(y)
