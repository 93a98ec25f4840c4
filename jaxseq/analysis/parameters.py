"""How large a model is."""

from collections.abc import Callable

import flax.linen as nn
import jax


def num_parameters(module: nn.Module, *inputs) -> int:
    """Parameters of a module that is called with such inputs; none are made."""
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def nearest_in_size(build: Callable[[int], nn.Module], parameters: int, *inputs) -> int:
    """The n, 1 or more, whose module `build(n)`, called with such inputs, comes nearest to so many parameters.

    They have to grow with n. Costs about 2 log2 n traces.

    Raises:
      ValueError: `parameters` is below 1.
    """
    if parameters < 1:
        raise ValueError(f"parameters={parameters}; choose 1 or more.")
    size = lambda n: num_parameters(build(n), *inputs)
    below, above = 1, 2
    while size(above) < parameters:
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if size(middle) < parameters else (below, middle)
    return min((below, above), key=lambda n: abs(size(n) - parameters))
