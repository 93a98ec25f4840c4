"""Synthesizer: attention without queries and keys."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..layers.mixer import Mixer, at_least
from ..layers.projection import projection, split_heads
from ..shapes import Array, Bool, Float, Int, accumulator, typed
from ..sharded import check_whole

KINDS = ("dense", "random", "factorised")


class Synthesizer(Mixer):
    """Weights over places that a token says by itself, or that are learned for all sequences (arXiv 2005.00743).

        o_t = Σ_s softmax_s(S_ts) v_s        S_t = W_2 relu(W_1 x_t + b_1) + b_2        "dense"
        S = R, max_length × max_length        "random"        S = R_1 R_2ᵀ, of `rank` columns        "factorised"

    for every head by itself. A shorter sequence uses the first columns, and rows. `mask` leaves tokens out of the sum.
    Every output sees all of the sequence: there is no state, and `__call__` alone.

    Raises:
      ValueError: x is longer than `max_length`, a number is below 1, `kind` is unknown, or there are segments, whose
        places are not those that were learned.
      NotImplementedError: time is split over devices, or a state is asked for.
    """

    d_model: int
    num_heads: int = 4
    max_length: int = 1024
    kind: str = "dense"
    rank: int = 8
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(
        self,
        x: Float[Array, "B T D"],
        state: Any,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        mask: Bool[Array, "B T"] | None = None,
    ):
        self.resumed(x, state)
        check_whole("Synthesizer", "give every device whole sequences")
        self._check(x.shape[1])
        if segment_ids is not None:
            raise ValueError("segment_ids: Synthesizer knows the places of a row; give one sequence a row.")
        width = self.d_model // self.num_heads
        v = split_heads(projection(self.d_model, "v_proj", self)(x), width)
        scores = self._scores(x, width)
        if mask is not None:
            scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = jnp.broadcast_to(nn.softmax(scores), (len(x), *scores.shape[1:])).astype(v.dtype)
        o = jnp.einsum("bhts,bshv->bthv", weights, v).reshape(x.shape)
        return projection(self.d_model, "out_proj", self)(o), None

    def _scores(self, x, width: int) -> Float[Array, "_ H T T"]:
        H, N, T = self.num_heads, self.max_length, x.shape[1]
        wide = lambda a: a.astype(accumulator(a.dtype))
        draw = lambda name, *shape: wide(self.param(name, nn.initializers.normal(0.02), shape, self.param_dtype))
        if self.kind == "dense":
            hidden = nn.relu(projection(self.d_model, "hidden_proj", self, use_bias=True)(x))
            hidden = wide(split_heads(hidden, width))
            kernel, bias = draw("kernel", H, width, N)[..., :T], draw("bias", H, 1, N)[..., :T]
            return jnp.einsum("bthk,hks->bhts", hidden, kernel) + bias[None]
        if self.kind == "random":
            return draw("scores", H, N, N)[None, :, :T, :T]
        rows, columns = draw("rows", H, N, self.rank), draw("columns", H, N, self.rank)
        return jnp.einsum("htr,hsr->hts", rows[:, :T], columns[:, :T])[None]

    @nn.nowrap
    def looks_ahead(self) -> str:
        return ""

    @nn.nowrap
    def _check(self, length: int) -> None:
        self.checked_heads(num_heads=self.num_heads)
        at_least(self, rank=1, max_length=1)
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}; choose one of {', '.join(KINDS)}.")
        if length > self.max_length:
            raise ValueError(f"x has length {length}; Synthesizer(max_length={self.max_length}) knows no more places.")
