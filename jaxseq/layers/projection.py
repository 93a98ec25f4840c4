"""Linear maps as the language models initialise them."""

from collections.abc import Callable

import flax.linen as nn
import jax

from .initialisers import symmetric_uniform


def projection(
    features: int,
    name: str,
    module: nn.Module,
    use_bias: bool = False,
    kernel_init: Callable | None = None,
    bias_init: Callable | None = None,
) -> nn.Dense:
    """A dense layer in the module's dtypes; its weights start as N(0, 0.02²) and its bias at 0, where None is given."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=kernel_init or nn.initializers.normal(0.02),
        bias_init=bias_init or nn.initializers.zeros,
        name=name,
    )


def split_heads(x: jax.Array, width: int) -> jax.Array:
    """`B T D` → `B T H width`."""
    return x.reshape(*x.shape[:2], -1, width)


def fan_in_projection(
    features: int, name: str, module: nn.Module, fan_in: int, bias_init: Callable | None = None
) -> nn.Dense:
    """A dense layer of `fan_in` inputs; weights, and biases where None is given, start uniform within ± fan_in^-½."""
    within = symmetric_uniform(fan_in**-0.5)
    return projection(features, name, module, use_bias=True, kernel_init=within, bias_init=bias_init or within)
