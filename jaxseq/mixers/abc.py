"""Attention with bounded memory control."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import ops
from ..layers.mixer import Mixer, at_least
from ..layers.projection import projection, split_heads
from ..layers.short_convolution import convolved, empty_convolutions
from ..ops.rescaled import rescaled
from ..shapes import Array, Float, Int, accumulator, typed


class ABCState(NamedTuple):
    slots: ops.SlotState
    log_sum: Float[Array, "B 1 _"]
    conv: tuple[Float[Array, "B W-1 _"], ...]


class ABC(Mixer):
    """Softmax attention over `num_slots` slots, each a learned mean of all keys and values so far (arXiv 2110.02488).

        φ_st = exp(x_s W_φ) / Σ_{r≤t} exp(x_r W_φ)        K_t = Σ_{s≤t} k_s φ_stᵀ        V_t = Σ_{s≤t} φ_st v_sᵀ
        o_t = V_tᵀ softmax(K^-½ K_tᵀ q_t)        y_t = o_t W_o        (section 3: ABC with a multilayer perceptron)

    W_φ gives every head slots of its own. `conv_window` puts a causal convolution and SiLU on query, key and value.
    """

    d_model: int
    num_heads: int = 4
    num_slots: int = 64
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_window: int | None = None
    chunk_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        H, (K, V) = self.num_heads, self._sizes()
        widths = {"q": H * K, "k": H * K, "v": H * V}
        (q, k, v), conv = convolved(self, x, widths, state.conv, segment_ids, silu="convolved")
        w = projection(H * self.num_slots, "slot_proj", self)(x)
        s, g, _, log_sum = rescaled(None, w.astype(accumulator(w.dtype)), state.log_sum, segment_ids)
        s, g = split_heads(s.astype(v.dtype), self.num_slots), split_heads(g, self.num_slots)
        o, slots = ops.slot_attention(
            split_heads(q, K), split_heads(k, K), split_heads(v, V), s, g, initial_state=state.slots,
            segment_ids=segment_ids, chunk_size=self.chunk_size, impl=self.impl,
        )  # fmt: skip
        y = projection(self.d_model, "out_proj", self)(o.reshape(*x.shape[:2], -1))
        slots = jax.tree.map(lambda new, old: new.astype(old.dtype), slots, state.slots)
        return y, ABCState(slots, log_sum, conv)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> ABCState:
        (H, M), (K, V) = (self.num_heads, self.num_slots), self._sizes()
        conv = empty_convolutions(self, batch_size, (H * K, H * K, H * V), dtype)
        zeros = lambda *shape: jnp.zeros((batch_size, H, *shape), accumulator(dtype))
        log_sum = jnp.full((batch_size, 1, H * M), -jnp.inf, accumulator(dtype))
        return ABCState(ops.SlotState(zeros(K, M), zeros(M, V)), log_sum, conv)

    @nn.nowrap
    def _sizes(self) -> tuple[int, ...]:
        """Key width and value width per head."""
        at_least(self, num_slots=1)
        return self.head_widths(self.num_heads, expand_k=self.expand_k, expand_v=self.expand_v)
