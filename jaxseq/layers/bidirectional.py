"""Both directions of time."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..ops.convolution import taps
from ..shapes import Array, Float, Int, typed
from ..sharded import check_whole


class Bidirectional(nn.Module):
    """y = m→(x) + flip(m←(flip(x))): any causal mixer, once in each direction with parameters of its own.

    `mixer` is a callable that takes `d_model`, as a slot of a model is. With `shared` one set of parameters serves
    both directions. Segments stay apart. It looks at the whole sequence: there is no state, and `__call__` alone.

    Raises:
      NotImplementedError: time is split over devices.
    """

    d_model: int
    mixer: Callable[..., nn.Module]
    shared: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        check_whole("Bidirectional", "give every device whole sequences")
        build = lambda name: self.mixer(d_model=self.d_model, dtype=self.dtype, param_dtype=self.param_dtype, name=name)
        forwards = build("forwards")
        backwards = forwards if self.shared else build("backwards")
        return forwards(x, segment_ids) + _flip(backwards(_flip(x), _flip(segment_ids)))


def two_sided(causal: Callable, x: Array, segment_ids: Array | None = None) -> Array:
    """causal(x, segment_ids, 0), and causal(…, 1) backwards in time on the tokens after each: none counts twice."""
    ids = _flip(segment_ids)
    (later, _), _ = taps(_flip(x), jnp.zeros_like(x[:, :1]), ids)
    return causal(x, segment_ids, 0) + _flip(causal(later, ids, 1))


def _flip(a: Array | None) -> Array | None:
    return None if a is None else jnp.flip(a, axis=1)
