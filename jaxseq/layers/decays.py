"""Log decays that more than one mixer has."""

import jax
import jax.numpy as jnp
import numpy as np


def retention_log_decays(num_heads: int) -> jax.Array:
    """log γ_h, γ_h = 1 − 2^(−5−h) for h = 0 … H − 1: memories of 32, 64, … tokens (RetNet, arXiv 2307.08621, eq. 8)."""
    return jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(num_heads)))))
