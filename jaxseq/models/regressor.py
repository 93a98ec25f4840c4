"""A prediction at every step of a sequence."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..layers.gated_mlp import GatedMLP
from ..layers.projection import Dense
from ..mixers.s4d import S4D
from ..shapes import Array, Float, Int, typed
from .block import Slot, Stack


class SequenceRegressor(nn.Module):
    """Encoder, residual blocks of any mixers, a linear head at every step: `B T F` → `B T outputs`.

    With mixers that have a state it goes on from one, in parts or step by step. With `lengths` only the first so many
    steps of each row count, and see nothing of the padding behind. The fields from `mlp` on are those of `Stack`.

    Raises:
      ValueError: `outputs` is below 1.
    """

    outputs: int
    d_model: int
    mixers: tuple[Slot, ...] = (partial(S4D, state_size=64),) * 4
    mlp: Slot = GatedMLP
    norm: str = "rms"
    dropout: float = 0.0
    remat: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @typed
    def __call__(
        self,
        x: Float[Array, "B T F"],
        segment_ids: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T _"]:
        return self.prefill(x, None, segment_ids, lengths)[0]

    @nn.compact
    @typed
    def prefill(
        self,
        x: Float[Array, "B T F"],
        states: Any,
        segment_ids: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T _"], Any]:
        """From the states of the layers, None at the start of a sequence that nothing follows."""
        if self.outputs < 1:
            raise ValueError(f"outputs={self.outputs} must be at least 1.")
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Dense(self.d_model, name="encoder", **dtypes)(x)
        x, states = self._stack(name="stack")(x, states, segment_ids, lengths)
        x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        return Dense(self.outputs, param_dtype=self.param_dtype, name="head")(x), states

    @typed
    def step(self, x: Float[Array, "B F"], states: Any) -> tuple[Float[Array, "B _"], Any]:
        y, states = self.prefill(x[:, None], states)
        return y[:, 0], states

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32):
        """The states at the start of a sequence."""
        return self._stack(parent=None).init_state(batch_size, max_length=max_length, dtype=dtype)

    @nn.nowrap
    def _stack(self, **options) -> Stack:
        names = ("d_model", "mixers", "mlp", "norm", "dropout", "remat", "dtype", "param_dtype")
        return Stack(**{name: getattr(self, name) for name in names}, **options)
