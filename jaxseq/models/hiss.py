"""Sequences of a slow quantity from a fast sensor: two levels, and the flat model they are compared with."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..layers.mixer import Mixer, at_least
from ..layers.projection import Dense
from ..mixers.mamba import Mamba
from ..mixers.s4 import S4
from ..shapes import Array, Bool, Float, Int, known, typed
from ..sharded import check_whole
from ._checks import check_finite, check_fitted, check_window
from .block import Stack

READOUTS = ("last", "first")


class HiSSState(NamedTuple):
    low: Any  # of the chunk in progress
    high: Any
    position: Int[Array, ""]  # samples of the chunk in progress


class HiSS(nn.Module):
    """A sequence model over the features that another one makes of each chunk (arXiv 2402.10211, section 4).

        f_i = W_f low(W_e x_{ik}, …, W_e x_{ik+k-1})_{k-1}        y_i = W_y high(f_0, …, f_i)_i

    with k = `chunk`: `low` starts anew at each chunk, and output i has seen the samples to the chunk's end. Both slots
    take any mixer, or a stack: `partial(Stack, mixers=(LSTM,))`. `low` is `low_width` wide, `d_model` where None. The
    defaults are the best for most of the authors' tasks.

    Raises:
      ValueError: `outputs`, `chunk` or a width is below 1; x is no whole number of chunks, 1 or more, of other channels
        than the parameters are for, or not finite where it is known, as it is outside `jit`.
      NotImplementedError: time is split over devices.
    """

    outputs: int
    chunk: int = 10
    d_model: int = 128
    low_width: int | None = 256
    low: Callable[..., nn.Module] = partial(
        Stack, mixers=(partial(S4, state_size=64),) * 6, mlp=None, norm="layer", dropout=0.1
    )
    high: Callable[..., nn.Module] = partial(Stack, mixers=(Mamba,) * 6, mlp=None, norm="layer", dropout=0.1)
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        (low, low_width), (high, width) = self._slots()
        self.embed = Dense(low_width, **dtypes)
        self.low_model = low(d_model=low_width, **dtypes)
        self.feature = Dense(width, **dtypes)
        self.high_model = high(d_model=width, **dtypes)
        self.head = Dense(self.outputs, **dtypes)

    @typed
    def __call__(self, x: Float[Array, "B L F"]) -> Float[Array, "B n _"]:
        """`B L F` samples to `B L/chunk outputs`."""
        return self._read(x, None)[0]

    @typed
    def prefill(self, x: Float[Array, "B L F"], state: HiSSState) -> tuple[Float[Array, "B n _"], HiSSState]:
        """Whole chunks that go on from a state at the border of two.

        Raises:
          ValueError: the state is inside a chunk, where that is known, as it is outside `jit`.
        """
        if (position := known(state.position)) is not None and position.any():
            raise ValueError(
                f"state.position={position}; HiSS.prefill goes on from 0, at the border of two chunks: step to it."
            )
        y, high = self._read(x, state.high)
        return y, state._replace(high=high)

    @typed
    def step(self, x: Float[Array, "B F"], state: HiSSState) -> tuple[Float[Array, "B _"], Bool[Array, ""], HiSSState]:
        """`(y, done, state)` after one sample: y is an output where it is `done` with a chunk, else zeros.

        Raises:
          ValueError: x is of other channels than the parameters are for, or not finite where it is known; the state is
            of another batch.
        """
        check_fitted(self, "embed", x.shape[1], "channels")
        check_finite("HiSS", x=x)
        fresh = self.init_state(x.shape[0], max_length=0).low
        for new, old in zip(jax.tree.leaves(fresh), jax.tree.leaves(state.low), strict=True):
            if new.shape != old.shape:
                raise ValueError(f"state.low has shape {old.shape}; a step of x {x.shape} takes {new.shape}.")
        low = jax.tree.map(
            lambda new, old: jnp.where(state.position == 0, new.astype(old.dtype), old), fresh, state.low
        )
        h, low = _run(self.low_model, self.embed(x)[:, None], low)
        after, high = _run(self.high_model, self.feature(h), state.high)  # kept if this is the end of a chunk
        done = state.position == self.chunk - 1
        high = jax.tree.map(lambda new, old: jnp.where(done, new, old), high, state.high)
        y = self.head(after)[:, 0]
        return jnp.where(done, y, jnp.zeros_like(y)), done, HiSSState(low, high, (state.position + 1) % self.chunk)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> HiSSState:
        """At the start; `max_length` is the number of chunks that a cache of `high` has room for."""
        low, high = (slot(d_model=width, parent=None) for slot, width in self._slots())
        return HiSSState(
            low.init_state(batch_size, max_length=self.chunk, dtype=dtype),
            high.init_state(batch_size, max_length=max_length, dtype=dtype),
            jnp.zeros((), jnp.int32),
        )

    def _read(self, x, high):
        """Outputs, and the state of `high` after them where there was one before."""
        check_whole("HiSS", "give every device whole sequences")
        batch, length, features = x.shape
        (_, width), _ = self._slots()
        if length % self.chunk:
            raise ValueError(f"x has {length} samples; HiSS(chunk={self.chunk}) takes whole chunks: pad or cut them.")
        check_fitted(self, "embed", features, "channels")
        check_window(self, x)
        chunks = self.embed(x.reshape(-1, self.chunk, features))
        last = _run(self.low_model, chunks, None)[0][:, -1].reshape(batch, -1, width)
        y, high = _run(self.high_model, self.feature(last), high)
        return self.head(y), high

    @nn.nowrap
    def _slots(self) -> tuple[tuple[Any, int], tuple[Any, int]]:
        """The two levels and their widths."""
        at_least(self, outputs=1, chunk=1, d_model=1, low_width=1)
        return (self.low, self.d_model if self.low_width is None else self.low_width), (self.high, self.d_model)


class FlatRegressor(nn.Module):
    """One sequence model over all samples, read once a chunk: what HiSS is compared with.

    At the "last" sample of each chunk it has seen what HiSS has; at the "first", the authors' readout, k − 1 less.

    Raises:
      ValueError: as of HiSS, or the readout is unknown.
    """

    outputs: int
    chunk: int = 10
    d_model: int = 128
    model: Callable[..., nn.Module] = partial(
        Stack, mixers=(partial(S4, state_size=64),) * 6, mlp=None, norm="layer", dropout=0.1
    )
    readout: str = "last"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B L F"]) -> Float[Array, "B n _"]:
        """`B L F` samples to `B L/chunk outputs`."""
        if self.readout not in READOUTS:
            raise ValueError(f"readout={self.readout!r}; choose one of {', '.join(READOUTS)}.")
        at_least(self, outputs=1, chunk=1, d_model=1)
        if x.shape[1] % self.chunk:
            raise ValueError(f"x has {x.shape[1]} samples; FlatRegressor(chunk={self.chunk}) takes whole chunks.")
        check_whole("FlatRegressor", "give every device whole sequences")
        check_fitted(self, "embed", x.shape[2], "channels")
        check_window(self, x)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = Dense(self.d_model, name="embed", **dtypes)(x)
        h, _ = _run(self.model(d_model=self.d_model, name="model", **dtypes), h, None)
        read = h[:, self.chunk - 1 :: self.chunk] if self.readout == "last" else h[:, :: self.chunk]
        return Dense(self.outputs, name="head", **dtypes)(read)


def _run(model: nn.Module, x: Array, state: Any) -> tuple[Array, Any]:
    """A mixer or a stack over x; without a state the sequence is in x alone."""
    if isinstance(model, Mixer):
        return model.prefill(x, model.start(x, max_length=0) if state is None else state)
    return model(x, state)
