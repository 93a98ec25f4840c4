"""Linear maps of low rank."""

from collections.abc import Callable

import flax.linen as nn

from ..shapes import Array


def low_rank(
    name: str,
    module: nn.Module,
    rank: int,
    features: int,
    activation: Callable[[Array], Array] = lambda x: x,
    bias_init: Callable | None = None,
    up_init: Callable | None = None,
) -> Callable[[Array], Array]:
    """x ↦ activation(x W_down) W_up + b, with `rank` channels between; without b where `bias_init` is None.

    W_down starts at zero, so that the map starts at b, and W_up orthogonal, a tenth as large, where `up_init` is None
    (RWKV-7, arXiv 2503.14456).
    """
    options = dict(dtype=module.dtype, param_dtype=module.param_dtype)
    down = nn.Dense(rank, use_bias=False, kernel_init=nn.initializers.zeros, name=f"{name}_down", **options)
    up = nn.Dense(
        features,
        use_bias=bias_init is not None,
        kernel_init=up_init or nn.initializers.orthogonal(0.1),
        bias_init=bias_init or nn.initializers.zeros,
        name=f"{name}_up",
        **options,
    )
    return lambda x: up(activation(down(x)))
