"""Linear maps of low rank."""

from collections.abc import Callable

import flax.linen as nn

from ..shapes import Array
from .projection import projection


def low_rank(
    name: str,
    module: nn.Module,
    rank: int,
    features: int,
    activation: Callable[[Array], Array] = lambda x: x,
    use_bias: bool = False,
    down_init: Callable | None = None,
    up_init: Callable | None = None,
    bias_init: Callable | None = None,
) -> Callable[[Array], Array]:
    """x ↦ activation(x W_down) W_up + b, with `rank` channels between; without b unless `use_bias`.

    Both start as a `projection` does where None is given.
    """
    down = projection(rank, f"{name}_down", module, kernel_init=down_init)
    up = projection(features, f"{name}_up", module, use_bias, up_init, bias_init)
    return lambda x: up(activation(down(x)))
