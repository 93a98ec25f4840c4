"""A label for every token."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..layers.gated_mlp import GatedMLP
from ..layers.projection import Dense
from ..layers.self_attention import SelfAttention
from ..layers.sinusoids import sinusoids
from ..shapes import Array, Float, Int, typed
from .block import Slot, Stack


class Tagger(nn.Module):
    """Embedding, residual blocks of any mixers, a linear head at every token: `B T` → logits `B T num_classes`.

    Mixers may look at the whole sequence, as those of `LanguageModel` may not. With `positions` `sinusoids` are added
    to the embedding, for mixers that do not know the order of tokens. With `lengths` only the first so many tokens of
    each row count, and see nothing of the padding behind. The fields from `mlp` on are those of `Stack`.

    Raises:
      ValueError: `vocab_size` or `num_classes` is below 1.
    """

    vocab_size: int
    num_classes: int
    d_model: int
    mixers: tuple[Slot, ...] = (partial(SelfAttention, num_heads=4),) * 4
    positions: bool = False
    mlp: Slot = GatedMLP
    remat: bool = True
    remat_policy: Callable | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T _"]:
        if self.vocab_size < 1 or self.num_classes < 1:
            raise ValueError(
                f"vocab_size={self.vocab_size} and num_classes={self.num_classes}; Tagger takes 1 or more."
            )
        x = nn.Embed(self.vocab_size, self.d_model, param_dtype=self.param_dtype, name="encoder")(tokens)
        if self.positions:
            waves = sinusoids(tokens.shape[1], self.d_model).astype(x.dtype)
            x = x * self.d_model**0.5 + waves[None]  # as large as one another
        names = ("d_model", "mixers", "mlp", "remat", "remat_policy", "dtype", "param_dtype")
        x, _ = Stack(**{name: getattr(self, name) for name in names}, name="stack")(x, None, segment_ids, lengths)
        x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        return Dense(self.num_classes, name="head")(x)
