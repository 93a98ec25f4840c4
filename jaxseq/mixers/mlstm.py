"""The matrix LSTM of xLSTM."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import ops
from ..layers.block_linear import BlockLinear
from ..layers.head_norm import head_norm
from ..layers.mixer import Mixer, at_least
from ..layers.normalised import with_ones
from ..layers.projection import projection, split_heads
from ..layers.short_convolution import ShortConvolution
from ..ops.rescaled import rescaled
from ..shapes import Array, Float, Int, accumulator, typed


class MLSTMState(NamedTuple):
    matrix: Float[Array, "B H K V+1"]  # C and, in the last column, n; both times exp(−maximum)
    maximum: Float[Array, "B 1 H"]
    conv: Float[Array, "B W-1 _"]


class MLSTM(Mixer):
    """A matrix memory with an exponential input gate, between two projections (arXiv 2405.04517, section 2.3).

        u, z = x W_u, x W_z        c = silu(conv(u))        q, k, v = c W_q, c W_k, u W_v
        f_t = σ([q, k, v] W_f + b_f)        i_t = exp([q, k, v] W_i + b_i)
        C_t = f_t C_{t-1} + i_t k_t v_tᵀ        n_t = f_t n_{t-1} + i_t k_t
        h_t = K^-½ C_tᵀ q_t / max(|K^-½ n_tᵀ q_t|, 1)        y = ((norm(h) + s ⊙ c) ⊙ silu(z)) W_o

    W_q, W_k, W_v are block-diagonal, in blocks of `qkv_block` channels; the norm is a LayerNorm of each head, without
    bias. C and n are kept times exp(−m), m_t = max(log f_t + m_{t-1}, log i_t), so that no gate overflows (eq. 15); m
    cancels, and no gradient goes through it. b_f starts at 3 to 6 over the heads, b_i as N(0, 0.1²),
    W_f and W_i at zero.
    """

    d_model: int
    num_heads: int = 4
    expand: float = 2.0
    qkv_block: int = 4
    conv_window: int = 4
    norm_eps: float = 1e-5
    chunk_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        width, K = self._sizes()
        small = nn.initializers.normal((2 / (5 * self.d_model)) ** 0.5)
        u, z = (projection(width, f"{name}_proj", self, kernel_init=small)(x) for name in ("up", "gate"))
        convolution = ShortConvolution(self.conv_window, True, self.dtype, self.param_dtype, name="conv")
        c, conv = convolution(u, state.conv, segment_ids)
        blocks, options = width // self.qkv_block, (False, self.dtype, self.param_dtype, small)
        q, k, v = (BlockLinear(blocks, *options, name=f"{n}_proj")(a) for n, a in (("q", c), ("k", c), ("v", u)))
        log_f, log_i = self._log_gates(jnp.concatenate([q, k, v], axis=-1))
        q, k, v = (split_heads(a, K) for a in (q, k, v))

        write, g, m, maximum = rescaled(log_f, log_i, state.maximum, segment_ids, "max_plus")
        written = write[..., None].astype(v.dtype) * with_ones(v)
        o, matrix = ops.gated_linear_attention(
            q, k, written, g, initial_state=state.matrix, segment_ids=segment_ids, chunk_size=self.chunk_size,
            impl=self.impl,
        )  # fmt: skip
        o = o.astype(m.dtype)
        h = (o[..., :-1] / jnp.maximum(jnp.abs(o[..., -1:]), jnp.exp(-m)[..., None])).astype(v.dtype)

        h = head_norm(self, self.num_heads, self.norm_eps, use_bias=False)(h.reshape(u.shape))
        skip = self.param("skip", nn.initializers.ones, (width,), self.param_dtype).astype(c.dtype)[None, None]
        y = projection(self.d_model, "out_proj", self)((h + skip * c) * nn.silu(z))
        return y, MLSTMState(matrix.astype(state.matrix.dtype), maximum, conv)

    def _log_gates(self, qkv):
        """log f and log i, `B T H`, in at least float32."""
        first = {
            "forget_gate": nn.initializers.constant(np.linspace(3.0, 6.0, self.num_heads)),
            "input_gate": nn.initializers.normal(0.1),
        }
        gate = lambda name, bias: projection(self.num_heads, name, self, True, nn.initializers.zeros, bias)(qkv)
        f, i = (gate(name, bias).astype(accumulator(qkv.dtype)) for name, bias in first.items())
        return jax.nn.log_sigmoid(f), i

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> MLSTMState:
        width, K = self._sizes()
        wide = accumulator(dtype)
        maximum = jnp.full((batch_size, 1, self.num_heads), -jnp.inf, wide)
        conv = jnp.zeros((batch_size, self.conv_window - 1, width), dtype)
        return MLSTMState(jnp.zeros((batch_size, self.num_heads, K, K + 1), wide), maximum, conv)

    @nn.nowrap
    def _sizes(self) -> tuple[int, int]:
        """Channels between the projections, and of a head."""
        (K,) = self.head_widths(self.num_heads, expand=self.expand)
        width = self.num_heads * K
        if self.qkv_block < 1 or width % self.qkv_block:
            raise ValueError(f"qkv_block={self.qkv_block} does not divide the {width} channels inside MLSTM.")
        at_least(self, conv_window=1)
        return width, K
