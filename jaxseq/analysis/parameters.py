"""How large a model is."""

import flax.linen as nn
import jax
import optax


def num_parameters(module: nn.Module, *inputs) -> int:
    """Parameters of a module that is called with such inputs; none are made."""
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return optax.tree.size(variables["params"])
