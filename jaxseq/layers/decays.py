"""Log decays of mixers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..shapes import accumulator, known
from .initialisers import log_of_uniform, step_size_bias
from .mixer import check_place
from .projection import projection


def retention_log_decays(num_heads: int) -> jax.Array:
    """log γ_h, γ_h = 1 − 2^(−5−h) for h = 0 … H − 1: memories of 32, 64, … tokens (RetNet, arXiv 2307.08621, eq. 8)."""
    return jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(num_heads)))))


def lightning_log_decays(num_heads: int, layer: int, num_layers: int) -> jax.Array:
    """log γ_h = −(8 h / H) (1 − layer / num_layers), h = 0 … H − 1 (TransNormerLLM, arXiv 2307.14995)."""
    check_place(layer, num_layers)
    return jnp.asarray(-8 * np.arange(num_heads) / num_heads * (1 - layer / num_layers))


def bounded_decay(z: jax.Array, lower_bound: Any) -> tuple[jax.Array, jax.Array]:
    """(log a, 1 − a) of a = b + (1 − b) σ(z), z `B T D` and the lower bound b one number or D of them.

    In logs throughout: where b is zero and z far below, a itself rounds to zero, and log a would be −∞.

    Raises:
      ValueError: a bound lies outside [0, 1), or there is another number of them.
    """
    values, width = known(lower_bound), z.shape[-1]
    if np.shape(lower_bound) not in ((), (width,)) or (values is not None and not ((values >= 0) & (values < 1)).all()):
        raise ValueError(f"lower_bound={lower_bound}; take one number or {width} of them, 0 or more and below 1.")
    b = jnp.broadcast_to(jnp.asarray(lower_bound, z.dtype), width)[None, None]
    log_a = jnp.logaddexp(jnp.broadcast_to(jnp.log(b), z.shape), jnp.log1p(-b) + jax.nn.log_sigmoid(z))
    return log_a, (1 - b) * jax.nn.sigmoid(-z)


def rate_and_step(module: nn.Module, z: jax.Array, heads: int, slowest: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """exp(A_log) `1 1 H 1` and z + b `B T H _`: log decays are −exp(A_log) softplus(z + b), as Mamba-2 has them.

    A_log and b are parameters of the module, for z `B T D` of all heads. exp(A_log) starts uniform between `slowest`
    and 16, softplus(b) log-uniform in [0.001, 0.1] (arXiv 2405.21060). Both are at least float32.
    """
    wide = accumulator(z.dtype)
    A_log = module.param("A_log", log_of_uniform(slowest, 16), (heads,), module.param_dtype)
    bias = module.param("dt_bias", step_size_bias(1e-3, 0.1), z.shape[-1:], module.param_dtype)
    z = z.astype(wide) + bias.astype(wide)[None, None]
    return jnp.exp(A_log.astype(wide))[None, None, :, None], z.reshape(*z.shape[:2], heads, -1)


def softplus_decay(module: nn.Module, x: jax.Array, heads: int) -> jax.Array:
    """−exp(A_log) softplus(x W + b) `B T H`."""
    rate, step = rate_and_step(module, projection(heads, "dt_proj", module)(x), heads)
    return (-rate * jax.nn.softplus(step))[..., 0]
