"""Linear maps as the language models initialise them."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from .initialisers import symmetric_uniform


def by_rows(x: jax.Array, kernel: jax.Array, dimension_numbers, **options) -> jax.Array:
    """`lax.dot_general` of a dense layer, `... D` times `D F`, with the axes in front made one.

    Of several axes XLA on CPU writes out the transpose for the kernel's gradient: an MLP trains at half the speed. Of
    the axes in front none but the first is to be split over devices, outside of `jax.shard_map`: else XLA gathers it.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


#: flax's layer, `by_rows`.
Dense = partial(nn.Dense, dot_general=by_rows)


def projection(
    features: int,
    name: str,
    module: nn.Module,
    use_bias: bool = False,
    kernel_init: Callable | None = None,
    bias_init: Callable | None = None,
) -> nn.Dense:
    """A dense layer in the module's dtypes; its weights start as N(0, 0.02²) and its bias at 0, where None is given."""
    return Dense(
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
