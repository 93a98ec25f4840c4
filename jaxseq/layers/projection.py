"""Linear maps as the language models initialise them."""

from collections.abc import Callable

import flax.linen as nn
import jax


def projection(
    features: int,
    name: str,
    module: nn.Module,
    use_bias: bool = False,
    kernel_init: Callable | None = None,
) -> nn.Dense:
    """A dense layer in the module's dtypes; its weights start as N(0, 0.02²) where `kernel_init` is None."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=kernel_init or nn.initializers.normal(0.02),
        name=name,
    )


def split_heads(x: jax.Array, width: int) -> jax.Array:
    """`B T D` → `B T H width`."""
    return x.reshape(*x.shape[:2], -1, width)
