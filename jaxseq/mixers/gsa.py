"""Gated slot attention."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import ops
from ..layers.mixer import Mixer, above_zero, at_least
from ..layers.projection import projection, split_heads
from ..layers.short_convolution import convolved, empty_convolutions
from ..shapes import Array, Float, Int, accumulator, typed


class GSAState(NamedTuple):
    slots: ops.SlotState
    conv: tuple[Float[Array, "B W-1 _"], ...]


class GSA(Mixer):
    """Softmax attention over `num_slots` slots, each a gated average of keys and of values (arXiv 2409.07146).

        g_t = log σ(x_t W_f) / τ        s_t = 1 − exp g_t
        K_t = K_{t-1} diag(exp g_t) + k_t s_tᵀ        V_t = diag(exp g_t) V_{t-1} + s_t v_tᵀ        (section 3)
        o_t = V_tᵀ softmax(K_tᵀ q_t)        y_t = RMSNorm(silu(o_t)) W_o

    Queries, keys and values go through SiLU. The norm is over all heads together. With `num_kv_heads` fewer heads of
    key, value and gate each serve a run of query heads, each of which keeps a state. `conv_window` puts a causal
    convolution in front of the SiLU.
    """

    d_model: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    num_slots: int = 64
    expand_k: float = 1.0
    expand_v: float = 1.0
    gate_temperature: float = 8.0
    conv_window: int | None = None
    norm_eps: float = 1e-5
    chunk_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        heads, kv_heads, K, V = self._sizes()
        widths = {"q": heads * K, "k": kv_heads * K, "v": kv_heads * V}
        (q, k, v), conv = convolved(self, x, widths, state.conv, segment_ids)
        z = split_heads(projection(kv_heads * self.num_slots, "decay_proj", self)(x), self.num_slots)
        g = jax.nn.log_sigmoid(z.astype(accumulator(z.dtype))) / self.gate_temperature
        served = lambda z: jnp.repeat(z, heads // kv_heads, axis=2)
        q, k, v, g = split_heads(q, K), served(split_heads(k, K)), served(split_heads(v, V)), served(g)
        s = -jnp.expm1(g).astype(v.dtype)
        o, slots = ops.slot_attention(
            q, k, v, s, g, scale=1.0, initial_state=state.slots, segment_ids=segment_ids, chunk_size=self.chunk_size,
            impl=self.impl,
        )  # fmt: skip
        slots = jax.tree.map(lambda new, old: new.astype(old.dtype), slots, state.slots)
        norm = nn.RMSNorm(self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")
        y = projection(self.d_model, "out_proj", self)(norm(nn.silu(o.reshape(*x.shape[:2], -1))))
        return y, GSAState(slots, conv)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> GSAState:
        heads, kv_heads, K, V = self._sizes()
        conv = empty_convolutions(self, batch_size, (heads * K, kv_heads * K, kv_heads * V), dtype)
        zeros = lambda *shape: jnp.zeros((batch_size, heads, *shape), accumulator(dtype))
        return GSAState(ops.SlotState(zeros(K, self.num_slots), zeros(self.num_slots, V)), conv)

    @nn.nowrap
    def _sizes(self) -> tuple[int, int, int, int]:
        """Heads, key-value heads, key width and value width per head."""
        at_least(self, num_slots=1)
        above_zero(self, "gate_temperature")
        return self.key_value_heads(self.num_heads, self.num_kv_heads, self.expand_k, self.expand_v)
