"""How the linear state space mixers end: a nonlinearity, and a gate by the same signal."""

import flax.linen as nn
import jax

from .projection import Dense

#: Names of the gated linear units at the end of a state space layer, as S5's authors have them.
GATED_OUTPUTS = ("full_glu", "half_glu1", "half_glu2", "gelu", "identity")


def gated_output(module: nn.Module, y: jax.Array, kind: str = "full_glu", approximate: bool = True) -> jax.Array:
    """What comes of the outputs y `B T D` of a state space, in the module's dtypes, with g = GELU(y).

        full_glu: (g W + b) ⊙ σ(g W' + b')        half_glu1: g ⊙ σ(g W + b)        half_glu2: y ⊙ σ(g W + b)

    "gelu" is g alone, "identity" y. GELU is the tanh approximation, or exact.
    """
    if kind == "identity":
        return y
    g, width = nn.gelu(y, approximate=approximate), y.shape[-1]
    if kind == "gelu":
        return g
    full = kind == "full_glu"
    features = 2 * width if full else width
    z = Dense(features, dtype=module.dtype, param_dtype=module.param_dtype, name="out_proj")(g)
    if full:
        return z[..., :width] * nn.sigmoid(z[..., width:])
    return (g if kind == "half_glu1" else y).astype(z.dtype) * nn.sigmoid(z)
