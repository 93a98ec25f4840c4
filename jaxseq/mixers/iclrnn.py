"""A recurrent network that is convex in its inputs, its kernels of spectral norm at most 1."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..layers.initialisers import drawn_wide
from ..layers.mixer import Mixer
from ..layers.recurrent_cell import recurrent
from ..shapes import Array, Float, Int, accumulator, known, typed

#: The parameters that `contracted` constrains.
KERNELS = ("_in_kernel", "_recurrent_kernel", "out_kernel")


class ICLRNNState(NamedTuple):
    layers: tuple[Float[Array, "B H"], ...]


class ICLRNN(Mixer):
    """An input-convex Lipschitz network (arXiv 2401.07494): ReLU layers over [x, −x], their kernels non-negative.

        h¹_t = relu([x_t, −x_t] W_1 + h¹_{t-1} U_1 + b_1)        h²_t = relu(h¹_t W_2 + h²_{t-1} U_2 + b_2)
        y_t = relu(h²_t W_o + b_o)

    With kernels ≥ 0 of spectral norm at most 1, y is convex in the whole sequence of inputs, and |Δh_t| ≤ |Δx_t| +
    |Δh_{t-1}| in each layer: over T steps, and with [x, −x], outputs may move more than inputs. The kernels are as
    `contracted` leaves them only after it: apply it to new parameters, and train behind
    `train.projected(optimizer, ICLRNN.contracted)`.

    `hidden_sizes` are the layers' widths, d_model twice where None. The recurrences are not linear: `impl="parallel"`
    solves each by Newton iterations, with the whole `jacobian` or its diagonal, in blocks of `block_size` tokens.
    """

    d_model: int
    hidden_sizes: tuple[int, ...] | None = None
    jacobian: str = "full"
    block_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        small = nn.initializers.normal(0.01)
        wide = lambda name, start, *shape: self._wide(self.param(name, start, shape, self.param_dtype))
        h, after = jnp.concatenate([x, -x], axis=-1).astype(accumulator(x.dtype)), []
        for n, (width, before) in enumerate(zip(self._widths(), state.layers, strict=True)):
            W = wide(f"layer_{n}_in_kernel", small, h.shape[-1], width)
            U = wide(f"layer_{n}_recurrent_kernel", drawn_wide(nn.initializers.orthogonal(0.1)), width, width)
            b = wide(f"layer_{n}_bias", nn.initializers.zeros, width)
            cell = lambda h, x, U=U: jax.nn.relu(x + h @ U)
            h, last = recurrent(self, cell, h @ W + b[None, None], before, segment_ids)
            after.append(last)
        W = wide("out_kernel", small, h.shape[-1], self.d_model)
        b = wide("out_bias", nn.initializers.zeros, self.d_model)
        y = jax.nn.relu(h @ W + b[None, None])
        return y.astype(x.dtype if self.dtype is None else self.dtype), ICLRNNState(tuple(after))

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> ICLRNNState:
        return ICLRNNState(tuple(jnp.zeros((batch_size, width), accumulator(dtype)) for width in self._widths()))

    @nn.nowrap
    def _widths(self) -> tuple[int, ...]:
        widths = (self.d_model,) * 2 if self.hidden_sizes is None else self.hidden_sizes
        if not widths or min(widths) < 1:
            raise ValueError(f"hidden_sizes={self.hidden_sizes}; ICLRNN takes one or more layers of 1 unit or more.")
        return widths

    @nn.nowrap
    def _wide(self, a):
        return a.astype(accumulator(a.dtype))

    @staticmethod
    def contracted(params, margin: float = 1e-3):
        """The parameters of one, or of a model with several, each kernel W made W⁺ / (‖W⁺‖₂ + `margin`).

        W⁺ = max(W, 0). Always, as the authors do: a kernel of smaller norm grows to it too.

        Raises:
          ValueError: `margin` is not above 0, there is no such kernel, or one is known to have nothing above 0 left or
            weights that are not finite.
        """
        if not margin > 0:
            raise ValueError(f"margin={margin}; contracted takes a number above 0.")

        def one(name, W):
            if not name.endswith(KERNELS):
                return W
            if (values := known(W)) is not None:
                if not np.isfinite(values).all():
                    raise ValueError(f"{name} has weights that are no finite numbers.")
                if not (values > 0).any():
                    raise ValueError(
                        f"{name} has no weight above 0: contracted would leave zeros, which no step moves."
                    )
            positive = jnp.maximum(W, 0).astype(accumulator(W.dtype))
            return (positive / (jnp.linalg.norm(positive, 2, axis=(-2, -1), keepdims=True) + margin)).astype(W.dtype)

        return _by_name(one, params)

    @staticmethod
    def opened(params):
        """The parameters of one with all its units on, x and −x pushing the same way: a linear map of its inputs.

        Where kernels are ≥ 0 no entry of any Jacobian of the network is larger in size than this map's, so the norm
        of the map, at one length of sequences, bounds the network's Lipschitz constant there.
        """

        def one(name, a):
            if name == "layer_0_in_kernel":
                of_x, of_minus_x = jnp.split(a, 2)
                return jnp.concatenate([of_x, -of_minus_x])
            return jnp.full_like(a, 1e6) if name.endswith("_bias") else a

        return _by_name(one, params)


def _by_name(one, params):
    """`one(name, leaf)` of all parameters.

    Raises:
      ValueError: none of them is a kernel of an ICLRNN.
    """
    name = lambda path: str(getattr(path[-1], "key", ""))
    names = [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if not any(n.endswith(KERNELS) for n in names):
        raise ValueError(f"params={names} hold no kernel of an ICLRNN.")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: one(name(path), leaf), params)
