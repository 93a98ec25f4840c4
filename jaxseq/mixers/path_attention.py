"""PaTH attention: positions that the data makes."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.cached_attention import cached_attention, counted, empty_cache
from ..layers.low_rank import low_rank
from ..layers.mixer import Mixer, at_least
from ..layers.normalised import unit
from ..layers.projection import projection, split_heads
from ..layers.short_convolution import ShortConvolution
from ..shapes import Array, Float, Int, accumulator, typed


class PaTHState(NamedTuple):
    cache: Any  # an `AttentionState`, keys as the next token finds them
    conv: Float[Array, "B W-1 D"]


class PaTHAttention(Mixer):
    """Softmax attention along a path of reflections, which takes the place of positions (arXiv 2505.16381).

        a_ij = softmax_j(K^-½ q_iᵀ H_i ⋯ H_{j+1} k_j)        H_u = I − β_u w_u w_uᵀ
        w_u = silu(conv(x_u W_1 W_2)) / ‖·‖        β_u = 2 σ(x_u W_β + b_β)

    `rank` is that of W_1 W_2; w and β are those of a key head. With a `forget_gate` keys fade too, as in `Attention`.
    The state is a cache of `max_length` keys, all of which every token reflects, and the window of the convolution.
    """

    d_model: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    rank: int = 32
    conv_window: int = 3
    forget_gate: bool = False
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    rotary_base = None  # no field: the path is the position

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        kv_heads, width = self._sizes()
        gate = lambda name, heads: projection(heads, name, self, use_bias=True)(x).astype(accumulator(x.dtype))
        w = low_rank("w", self, self.rank, kv_heads * width)(x)
        convolution = ShortConvolution(self.conv_window, dtype=self.dtype, param_dtype=self.param_dtype, name="w_conv")
        w, conv = convolution(w, state.conv, segment_ids)
        path = dict(direction=unit(split_heads(w, width)), beta=2 * nn.sigmoid(gate("beta_proj", kv_heads)))
        log_decay = nn.log_sigmoid(gate("forget_proj", self.num_heads)) if self.forget_gate else None
        y, cache = cached_attention(
            self, x, state.cache, counted(segment_ids), kv_heads,
            partial(ops.path_attention, **path, impl=self.impl), log_decay, partial(ops.reflected_keys, **path),
        )  # fmt: skip
        return y, PaTHState(cache, conv)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> PaTHState:
        at_least(self, rank=1, conv_window=1)
        kv_heads, width = self._sizes()
        cache = empty_cache(self, batch_size, [max_length], kv_heads, dtype, self.forget_gate)
        return PaTHState(cache, jnp.zeros((batch_size, self.conv_window - 1, kv_heads * width), dtype))

    @nn.nowrap
    def _sizes(self) -> tuple[int, int]:
        """Key heads, and channels of one."""
        _, kv_heads, width, _ = self.key_value_heads(self.num_heads, self.num_kv_heads, 1.0, 1.0)
        return kv_heads, width
