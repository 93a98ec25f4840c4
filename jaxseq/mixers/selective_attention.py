"""Selective attention: each token decides whether it takes part."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import ops
from ..layers.cached_attention import AttentionState, empty_cache, query_key_value
from ..layers.mixer import Mixer
from ..layers.projection import projection
from ..segments import segment_counts
from ..shapes import Array, Bool, Float, Int, accumulator, typed
from ..sharded import check_whole, devices, on_last, sum_over_time

KEYS = ("selected", "all")
#: The segment of keys that no query sees.
UNSEEN = -1


class SelectiveAttention(Mixer):
    """Attention among those tokens that select themselves (Zoology, arXiv 2312.04927, section 5).

        p_t = σ(x_t · w + b)        y_t = x_t + [p_t > τ] p_t Σ_{j ≤ t, p_j > τ} a_tj v_j W_o

    with a the softmax of scaled q_t · k_j over these j, and rotary positions. With `threshold` τ = 0 all tokens take
    part: so one trains, with `selection_loss` · relu(mean_t p_t − K/N) added to the loss, K the `budget` of the N
    tokens of a call, √N when None. It is sown into the collection "losses", and p into "intermediates":
    `apply(..., mutable=["losses"])` hands it out. What is trained then runs under a higher `threshold`, which is
    causal: a call, its parts and its steps agree. With `keys` "all" a selected token attends to every earlier one, as
    all do in training; the authors' evaluation keeps the selected alone.

    `top` is that evaluation: of each sequence the so many tokens of greatest p, at the cost of their pairs alone. Ranks
    depend on what comes later, so it has `__call__` alone, on one sequence a row, and none are of those that `mask`
    leaves out; `threshold` and `keys` play no part.

    The state is a cache of the last `max_length` tokens that can be attended to. Tokens that were not selected take no
    room, so it may be as much shorter as they are many; with `keys` "all" it is as long as attention's.
    """

    d_model: int
    num_heads: int = 4
    threshold: float = 0.0
    keys: str = "selected"
    top: int | None = None
    budget: int | None = None
    selection_loss: float = 1e-3
    rotary_base: float | None = 10000.0
    impl: str | None = None
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
        state = self.resumed(x, state)
        self._check()
        self.check_mask(mask)
        chance = nn.sigmoid(projection(1, "select_proj", self, use_bias=True)(x)[..., 0].astype(accumulator(x.dtype)))
        self._sow(chance)
        q, k, v = query_key_value(self, x, 0 if state is None else state.position, self.num_heads)
        if state is None:
            if segment_ids is not None:
                raise ValueError(f"segment_ids: top={self.top} ranks all tokens of a row; give one sequence a row.")
            o = self._among_top(q, k, v, chance, mask)
        else:
            # Segments are counted from the one in progress at the start of the call.
            counts = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else segment_counts(segment_ids)
            o, state = self._among_selected(q, k, v, counts, chance > self.threshold, state)
        y = projection(self.d_model, "out_proj", self)(o.reshape(x.shape))
        return x + chance.astype(y.dtype)[..., None] * y, state

    def _among_selected(self, q, k, v, counts, selected, state):
        """Attention from the selected tokens to them, or to all, and the state after the call."""
        cached, seen = state.key.shape[1], selected if self.keys == "selected" else jnp.ones_like(selected)
        k = jnp.concatenate([state.key.astype(k.dtype), k], axis=1)
        v = jnp.concatenate([state.value.astype(v.dtype), v], axis=1)
        segments = jnp.concatenate([state.segment, jnp.where(seen, counts, UNSEEN)], axis=1)
        o = ops.softmax_attention(q, k, v, segment_ids=counts, key_segment_ids=segments, impl=self.impl)
        # The cache, then the seen tokens of the call, in order: the end is what is kept. A step has nothing to sort.
        kept = seen.sum(1, keepdims=True) + jnp.arange(cached)[None]
        kept = jnp.where(kept < cached, kept, cached + _take(jnp.argsort(~seen, stable=True), kept - cached))
        segments = jnp.where(segments < 0, UNSEEN, segments - counts[:, -1:])
        last = lambda a, like: on_last(_take(a, kept).astype(like.dtype))
        return jnp.where(selected[..., None, None], o, 0), AttentionState(
            last(k, state.key),
            last(v, state.value),
            last(segments, segments),
            state.position + counts.shape[1] * devices(),
        )

    def _among_top(self, q, k, v, chance, mask):
        """Attention among the `top` tokens of each sequence, zero elsewhere."""
        check_whole("SelectiveAttention(top=...)", "select by threshold")
        length = chance.shape[1]
        chance = chance if mask is None else jnp.where(mask, chance, -1)  # such a token is chosen last of all
        chosen = jnp.sort(jax.lax.top_k(chance, min(self.top, length))[1], axis=1)
        seen = jnp.zeros(chance.shape, jnp.int32) if mask is None else jnp.where(mask, 0, UNSEEN)
        q, k, v, seen = (_take(a, chosen) for a in (q, k, v, seen))
        o = ops.softmax_attention(q, k, v, segment_ids=jnp.zeros_like(seen), key_segment_ids=seen, impl=self.impl)
        return jax.vmap(lambda o, at: jnp.zeros((length, *o.shape[1:]), o.dtype).at[at].set(o))(o, chosen)

    def _sow(self, chance) -> None:
        """What selecting more than the budget costs, and p itself."""
        if self.is_initializing():
            return  # else it would be among the parameters
        length = chance.shape[1] * devices()
        share = (length**0.5 if self.budget is None else self.budget) / length
        mean = sum_over_time(chance.mean()) / devices()
        self.sow("intermediates", "chance", chance)
        self.sow("losses", "selection", self.selection_loss * nn.relu(mean - share))

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> AttentionState:
        self._check()
        self.check_causal()
        return empty_cache(self, batch_size, [max_length], self.num_heads, dtype)

    @nn.nowrap
    def looks_ahead(self) -> str | None:
        return None if self.top is None else f"top={self.top}"

    @nn.nowrap
    def _check(self) -> None:
        self.checked_heads(num_heads=self.num_heads)
        if self.keys not in KEYS:
            raise ValueError(f"keys={self.keys!r} is unknown to SelectiveAttention; choose one of {', '.join(KEYS)}.")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold={self.threshold}; SelectiveAttention takes 0 or more, below 1.")
        for name in ("top", "budget"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; SelectiveAttention takes 1 or more, or None.")


def _take(x: Array, at: Int[Array, "B L"]) -> Array:
    """The tokens of x `B T …` at these places."""
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)
