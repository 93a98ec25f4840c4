"""The language model."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..layers.gated_mlp import GatedMLP
from ..layers.ngram_embedding import NgramEmbedding
from ..layers.projection import Dense
from ..mixers.gla import GLA
from ..shapes import Array, Float, Int, typed
from .block import Slot, Stack


class LanguageModelState(NamedTuple):
    ngram: Int[Array, "B N-1"]  # what the longest n-gram reaches back to, each stored as token + 1; 0 is none
    layers: tuple  # as `Stack` says


class LanguageModel(nn.Module):
    """Embedding, residual blocks of any mixers, norm, vocabulary head.

    `mixers` holds one slot a layer, each a callable that takes `d_model`: `(partial(GLA, num_heads=4),) * 4`, or
    different ones for a hybrid. `mlp` is the slot of the feed-forward layers, None for none. With `tied` the head is
    the embedding table. `ngrams` are the sizes of n-grams whose hashed embeddings are added to the tokens' own
    (`NgramEmbedding`). `shared`, one set of parameters for all layers, and `reversible`, memory that does not grow with
    depth, are as in `Stack`. `dtype` is what layers compute in; parameters, states and logits stay at least float32.
    """

    vocab_size: int
    d_model: int
    mixers: tuple[Slot, ...] = (partial(GLA, num_heads=4),) * 4
    mlp: Slot = GatedMLP
    tied: bool = False
    ngrams: tuple[int, ...] = ()
    ngram_buckets: int = 2**15
    norm_eps: float = 1e-6
    remat: bool = True
    remat_policy: Callable | None = None
    shared: bool = False
    reversible: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @typed
    def prefill(
        self, tokens: Int[Array, "B T"], states: Any, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T _"], Any]:
        """`(tokens "B T", states) → (logits "B T vocab_size", states)`. Tokens are in [0, vocab_size)."""
        return self._read(tokens, self.init_state(tokens.shape[0]) if states is None else states, segment_ids)

    @typed
    def __call__(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T _"]:
        """`tokens "B T" → logits "B T vocab_size"`."""
        return self._read(tokens, None, segment_ids)[0]

    @nn.compact
    def _read(self, tokens, states, segment_ids):
        """Logits and states; None where the sequence starts and ends in the call."""
        if self.vocab_size < 1 or self.d_model < 1:
            raise ValueError(f"vocab_size={self.vocab_size} and d_model={self.d_model}; LanguageModel takes 1 or more.")
        if tokens.size and not isinstance(tokens, jax.core.Tracer):  # else an embedding of NaN, or of another token
            lowest, highest = np.min(np.asarray(tokens)), np.max(np.asarray(tokens))
            if not 0 <= lowest <= highest < self.vocab_size:
                raise ValueError(
                    f"tokens are {lowest} to {highest}; vocab_size={self.vocab_size} takes 0 to {self.vocab_size - 1}."
                )
        jax.eval_shape(lambda: self.init_state(1, max_length=0))  # raises where a mixer would look ahead
        normal = nn.initializers.normal(0.02)
        embed = nn.Embed(self.vocab_size, self.d_model, param_dtype=self.param_dtype, embedding_init=normal)
        before = self._no_ngram(tokens.shape[0]) if states is None else states.ngram
        x, ngram = embed(tokens), before
        if self.ngrams:
            ngrams = NgramEmbedding(self.d_model, self.ngrams, self.ngram_buckets, self.param_dtype, name="ngrams")
            y, ngram = ngrams(tokens, before, segment_ids)
            x = x + y
        x, layers = self._stack()(x, states and states.layers, segment_ids)
        x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        if self.tied:
            logits = embed.attend(x.reshape(-1, self.d_model)).reshape(*tokens.shape, self.vocab_size)  # see `by_rows`
        else:
            wide = jnp.promote_types(jnp.float32, self.param_dtype)
            logits = Dense(self.vocab_size, use_bias=False, kernel_init=normal, param_dtype=wide, name="head")(x)
        return logits, LanguageModelState(ngram, layers)

    @typed
    def step(self, tokens: Int[Array, "B"], states: Any):
        """One token: `(tokens "B", states) → (logits "B vocab_size", states)`."""
        logits, states = self.prefill(tokens[:, None], states)
        return logits[:, 0], states

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32):
        """The state at the start of a sequence."""
        layers = self._stack(parent=None).init_state(batch_size, max_length=max_length, dtype=dtype)
        return LanguageModelState(self._no_ngram(batch_size), layers)

    @nn.nowrap
    def _no_ngram(self, batch_size: int) -> Int[Array, "B N-1"]:
        return jnp.zeros((batch_size, max(self.ngrams, default=1) - 1), jnp.int32)

    @nn.nowrap
    def _stack(self, **options) -> Stack:
        names = ("d_model", "mixers", "mlp", "norm_eps", "remat", "remat_policy", "shared", "reversible")
        fields = {name: getattr(self, name) for name in (*names, "dtype", "param_dtype")}
        return Stack(**fields, name="stack", **options)
