"""RWKV-6, Finch."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import constant, zeros

from .. import ops
from ..layers.head_norm import head_norm
from ..layers.initialisers import symmetric_uniform
from ..layers.low_rank import low_rank
from ..layers.mixer import Mixer, at_least
from ..layers.projection import projection, split_heads
from ..layers.token_shift import first_shares, token_shift
from ..shapes import Array, Float, Int, accumulator, typed


class RWKV6State(NamedTuple):
    matrix: Float[Array, "B H K V"]
    last: Float[Array, "B 1 D"]


class RWKV6(Mixer):
    """Linear attention with a data-dependent decay, a bonus for the current token and token shift (arXiv 2404.05892).

        δ_t = x_{t-1} − x_t        x^c_t = x_t + δ_t ⊙ μ^c_t, c = r, w, k, v, g
        μ_t = b + tanh((x_t + δ_t ⊙ μ_x) W_1) W_2
        r, k, v = x^r W_r, x^k W_k, x^v W_v        g_t = −exp(b_w + tanh(x^w W_w1) W_w2)        (section 4)
        o_t = (S_{t-1} + diag(u) k_t v_tᵀ)ᵀ r_t        S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ
        y_t = (norm(o_t) ⊙ silu(x^g W_g)) W_o

    The norm is a LayerNorm of each head. `layer`, 0 the first, of the `num_layers` of a model sets where μ, the decays
    and u start, as in the authors' models. Their heads are 64 wide in key and value. The mixes are of rank `mix_rank`,
    the decay of rank `decay_rank`.

    It is the authors' time mixing; where their blocks have channel mixing, a `Stack` has its MLP.
    """

    d_model: int
    num_heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    mix_rank: int = 32
    decay_rank: int = 64
    layer: int = 0
    num_layers: int = 1
    norm_eps: float = 1e-5
    chunk_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        K, V = self._sizes()
        x = x if self.dtype is None else x.astype(self.dtype)
        shift, last = token_shift(x, state.last, segment_ids)
        x_r, x_w, x_k, x_v, x_g = self._mixes(x, shift)
        heads = lambda name, x, width: split_heads(projection(self.num_heads * width, f"{name}_proj", self)(x), width)
        r, k, v = heads("r", x_r, K), heads("k", x_k, K), heads("v", x_v, V)
        start = dict(down_init=zeros, up_init=symmetric_uniform(0.01), bias_init=constant(self._first_decays()))
        decay = low_rank("decay", self, self.decay_rank, self.num_heads * K, nn.tanh, True, **start)
        w = split_heads(decay(x_w).astype(accumulator(x.dtype)), K)
        # A log decay of −∞ in all channels would be a new segment, and its gradient no number.
        g = -jnp.exp(jnp.minimum(w, np.floor(np.log(jnp.finfo(w.dtype).max))))
        bonus = self.param("bonus", constant(self._first_bonus()), (self.num_heads, K), self.param_dtype)
        o, matrix = ops.gated_linear_attention(
            r, k, v, g, bonus=bonus, scale=1.0, initial_state=state.matrix, segment_ids=segment_ids,
            chunk_size=self.chunk_size, impl=self.impl,
        )  # fmt: skip
        o = head_norm(self, self.num_heads, self.norm_eps)(o.reshape(*x.shape[:2], -1))
        o *= nn.silu(projection(self.num_heads * V, "gate_proj", self)(x_g))
        return projection(self.d_model, "out_proj", self)(o), RWKV6State(matrix.astype(state.matrix.dtype), last)

    def _mixes(self, x, shift):
        """The five blends of each token with the one before it, by channel and by content."""
        D, R = self.d_model, self.mix_rank
        mu = self.param("mix", constant(self._share(1.0)), (D,), self.param_dtype)
        bias = self.param("mix_bias", constant(self._first_mixes()), (5, D), self.param_dtype)
        up = self.param("mix_up", symmetric_uniform(0.01), (5 * R, D), self.param_dtype)
        mu, bias, up = (p.astype(x.dtype) for p in (mu, bias, up))
        down = projection(5 * R, "mix_down", self, kernel_init=zeros)
        low = nn.tanh(down(x + shift * mu[None, None])).reshape(*x.shape[:2], 5, R)
        mixes = jnp.einsum("btcr,crd->cbtd", low, up.reshape(5, R, D)) + bias[:, None, None]
        return x[None] + shift[None] * mixes

    def _depth(self) -> float:
        """0 for the first layer, 1 for the last."""
        return self.layer / max(1, self.num_layers - 1)

    def _share(self, power: float):
        return first_shares(self.d_model, self.layer, self.num_layers, power)

    def _first_mixes(self):
        r, w, k, v, g = (self._share(power) for power in (0.5, 1, 1, 1, 0.5))
        return np.stack([r, w, k, v - 0.3 * self._depth(), g])

    def _first_decays(self):
        ramp = np.linspace(0, 1, self.num_heads * self._sizes()[0])
        return -6 + 5 * ramp ** (0.7 + 1.3 * self._depth())

    def _first_bonus(self):
        size = self.num_heads * self._sizes()[0]
        zigzag = (np.arange(size) + 1) % 3 - 1
        return (self._depth() * (1 - np.linspace(0, 1, size)) + 0.1 * zigzag).reshape(self.num_heads, -1)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> RWKV6State:
        matrix = jnp.zeros((batch_size, self.num_heads, *self._sizes()), accumulator(dtype))
        return RWKV6State(matrix, jnp.zeros((batch_size, 1, self.d_model), dtype))

    @nn.nowrap
    def _sizes(self) -> tuple[int, ...]:
        """Key width and value width per head."""
        at_least(self, mix_rank=1, decay_rank=1)
        return self.head_widths(self.num_heads, expand_k=self.expand_k, expand_v=self.expand_v)
