"""What models check of their windows before anything is computed."""

from typing import Any

import flax.linen as nn

from ..shapes import Array


def check_forecaster(module: Any, x: Array) -> None:
    """Raise unless there is a step to forecast, and x `B L V` has a step and a variate."""
    if module.horizon < 1:
        raise ValueError(f"horizon={module.horizon} must be at least 1.")
    if 0 in x.shape[1:]:
        raise ValueError(
            f"x has {x.shape[1]} steps of {x.shape[2]} variates; {type(module).__name__} takes 1 or more of each."
        )


def check_fitted(module: nn.Module, name: str, size: int, of: str, leaf: str = "kernel") -> None:
    """Raise where the dense layer `name` of a module has parameters already, and these are for inputs of another size.

    `of` is what the inputs are; in place of a dense layer's there may be a parameter of the module itself, `leaf` "".
    """
    if module.has_variable("params", name):
        made: Any = module.get_variable("params", name)
        rows = (made[leaf] if leaf else made).shape[0]
        if rows != size:
            raise ValueError(f"x has {size} {of}; the parameters of this {type(module).__name__} are for {rows}.")
