"""Linear maps as the language models initialise them."""

import flax.linen as nn
import jax


def projection(features: int, name: str, module: nn.Module, use_bias: bool = False) -> nn.Dense:
    """A dense layer with weights N(0, 0.02²) in the module's dtypes."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=nn.initializers.normal(0.02),
        name=name,
    )


def split_heads(x: jax.Array, width: int) -> jax.Array:
    """`B T D` → `B T H width`."""
    return x.reshape(*x.shape[:2], -1, width)
