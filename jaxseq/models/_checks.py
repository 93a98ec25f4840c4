"""What models check of their windows before anything is computed."""

from typing import Any

import flax.linen as nn
import numpy as np

from ..shapes import Array, known


def check_forecaster(module: Any, x: Array) -> None:
    """Raise unless there is a step to forecast, and x is a window."""
    if module.horizon < 1:
        raise ValueError(f"horizon={module.horizon} must be at least 1.")
    check_window(module, x)


def check_window(module: Any, x: Array) -> None:
    """Raise unless x `B L V` has a step and a variate, and, where they are known, finite numbers alone."""
    if 0 in x.shape[1:]:
        raise ValueError(
            f"x has {x.shape[1]} steps of {x.shape[2]} variates; {type(module).__name__} takes 1 or more of each."
        )
    check_finite(type(module).__name__, x=x)


def check_finite(owner: str, **arrays: Array | np.ndarray | None) -> None:
    """Raise where an array is known, as it is outside `jit`, and not all of it is finite."""
    for name, array in arrays.items():
        if (values := known(array)) is not None and not (finite := np.isfinite(values)).all():
            at = np.argwhere(~finite)[0].tolist()
            raise ValueError(
                f"{name} is {values[tuple(at)]} at {at}; {owner} takes finite numbers: fill what is missing."
            )


def check_fitted(module: nn.Module, name: str, size: int, of: str, *, each: int = 1, leaf: str = "kernel") -> None:
    """Raise where the dense layer `name` of a module has parameters already, and these are for inputs of another size.

    `of` is what the inputs are, `each` of them so many numbers; in place of a dense layer's there may be a parameter of
    the module itself, `leaf` "".
    """
    if module.has_variable("params", name):
        made: Any = module.get_variable("params", name)
        rows = (made[leaf] if leaf else made).shape[0] // each
        if rows != size:
            raise ValueError(f"x has {size} {of}; the parameters of this {type(module).__name__} are for {rows}.")
