"""The sequence classifier."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..layers.gated_mlp import GatedMLP
from ..layers.projection import Dense
from ..mixers.s4d import S4D
from ..shapes import Array, Float, Int, typed
from ..sharded import devices, first_position, sum_over_time
from .block import Slot, Stack


class Classifier(nn.Module):
    """Encoder, residual blocks of any mixers, pooling over time, linear head.

    Tokens `B T` are embedded from `vocab_size`, features `B T F` projected. `pool` is "mean" or "last"; with
    `lengths` only the first so many positions of each sequence count, and see nothing of the padding behind. `norm`,
    `prenorm`, `dropout`, `shared` and `reversible` are as in `Stack`: nothing is dropped unless there is an rng
    "dropout".
    """

    num_classes: int
    d_model: int
    mixers: tuple[Slot, ...] = (partial(S4D, state_size=64),) * 4
    mlp: Slot = GatedMLP
    vocab_size: int | None = None
    pool: str = "mean"
    norm: str = "rms"
    norm_eps: float = 1e-6
    prenorm: bool = True
    dropout: float = 0.0
    remat: bool = True
    shared: bool = False
    reversible: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self, x: Float[Array, "B T F"] | Int[Array, "B T"], lengths: Int[Array, "B"] | None = None
    ) -> Float[Array, "B _"]:
        """`B T F` or `B T` → logits `B num_classes`."""
        if self.pool not in ("mean", "last"):
            raise ValueError(f"pool={self.pool!r}; Classifier takes 'mean' or 'last'.")
        if (x.ndim == 2) != (self.vocab_size is not None):
            raise ValueError(f"x has shape {x.shape} and vocab_size={self.vocab_size}; tokens take one, features none.")
        if self.vocab_size is not None:
            x = nn.Embed(self.vocab_size, self.d_model, param_dtype=self.param_dtype, name="encoder")(x)
        else:
            x = Dense(self.d_model, dtype=self.dtype, param_dtype=self.param_dtype, name="encoder")(x)
        names = ("d_model", "mixers", "mlp", "norm", "norm_eps", "prenorm", "dropout", "remat", "shared", "reversible")
        fields = {name: getattr(self, name) for name in (*names, "dtype", "param_dtype")}
        x, _ = Stack(**fields, name="stack")(x, lengths=lengths)
        x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        position = (first_position(x.shape[1]) + jnp.arange(x.shape[1], dtype=jnp.int32))[None]
        lengths = jnp.full(x.shape[:1], x.shape[1] * devices()) if lengths is None else lengths
        counted = position < lengths[:, None] if self.pool == "mean" else position == lengths[:, None] - 1
        counted = counted.astype(x.dtype)
        count = jnp.maximum(sum_over_time(counted.sum(-1, keepdims=True)), 1)
        pooled = sum_over_time(jnp.einsum("btd,bt->bd", x, counted)) / count
        return Dense(self.num_classes, name="head")(pooled)
