"""Lightning attention."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.decays import lightning_log_decays
from ..layers.mixer import Mixer
from ..layers.projection import projection, split_heads
from ..shapes import Array, Float, Int, accumulator, typed


class LightningState(NamedTuple):
    matrix: Float[Array, "B H K V"]


class Lightning(Mixer):
    """Linear attention with a fixed decay per head and layer (TransNormerLLM, arXiv 2307.14995, section 3).

        q, k, v = silu(x W_q), silu(x W_k), silu(x W_v)        log γ_h = −(8 h / H) (1 − l / L), h = 0 … H − 1
        S_t = γ_h S_{t-1} + k_t v_tᵀ        o_t = K^-½ S_tᵀ q_t        y_t = (RMSNorm(o_t) ⊙ σ(x_t W_g)) W_o

    l is `layer`, 0 the first, of the L `num_layers` of a model; the first head never forgets. The norm is over all
    heads together; the activations and the gate are those of MiniMax-01 (arXiv 2501.08313), which divides by no K^½:
    the norm undoes it.
    """

    d_model: int
    num_heads: int = 4
    layer: int = 0
    num_layers: int = 1
    expand_k: float = 1.0
    expand_v: float = 1.0
    norm_eps: float = 1e-5
    chunk_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        H, (K, V) = self.num_heads, self._sizes()
        q, k, v = (
            split_heads(nn.silu(projection(H * width, f"{name}_proj", self)(x)), width)
            for name, width in (("q", K), ("k", K), ("v", V))
        )
        o, matrix = ops.gated_linear_attention(
            q, k, v, lightning_log_decays(H, self.layer, self.num_layers), initial_state=state.matrix,
            segment_ids=segment_ids, chunk_size=self.chunk_size, impl=self.impl,
        )  # fmt: skip
        norm = nn.RMSNorm(self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")
        o = norm(o.reshape(*x.shape[:2], -1)) * nn.sigmoid(projection(H * V, "gate_proj", self)(x))
        return projection(self.d_model, "out_proj", self)(o), LightningState(matrix.astype(state.matrix.dtype))

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> LightningState:
        K, V = self._sizes()
        return LightningState(jnp.zeros((batch_size, self.num_heads, K, V), accumulator(dtype)))

    @nn.nowrap
    def _sizes(self) -> tuple[int, ...]:
        """Key width and value width per head."""
        return self.head_widths(self.num_heads, expand_k=self.expand_k, expand_v=self.expand_v)
