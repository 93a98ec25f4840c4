"""MesaNet: a linear layer fitted to the past, optimally."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import ops
from ..layers.head_readout import head_readout
from ..layers.mixer import Mixer, at_least
from ..layers.normalised import unit
from ..layers.projection import projection, split_heads
from ..layers.short_convolution import convolved, empty_convolutions
from ..shapes import Array, Float, Int, accumulator, typed


class MesaNetState(NamedTuple):
    memory: ops.MesaState
    conv: tuple[Float[Array, "B W-1 _"], ...]


class MesaNet(Mixer):
    """Linear regression of values on keys, solved at every token (arXiv 2506.05233).

        log γ_t = log σ(x_t W_a + b_a)        β_t = σ(x_t W_b + b_b)        Λ = softplus(λ) + ¼
        H_t = γ_t H_{t-1} + β_t k_t k_tᵀ        G_t = γ_t G_{t-1} + β_t k_t v_tᵀ
        o_t = G_tᵀ (H_t + diag Λ)⁻¹ q_t        y_t = RMSNorm(o_t) W_o

    Queries and keys go through a causal convolution and SiLU, and are unit vectors. Λ starts at 1. The system is
    solved by `solver_steps` conjugate gradients in at least float32. The norm is per head with one weight vector for
    all heads; with `output_gate` silu(x_t W_g) multiplies what it gives.
    """

    d_model: int
    num_heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    solver_steps: int = 30
    conv_window: int | None = 4
    output_gate: bool = False
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
        (q, k), conv = convolved(self, x, {"q": H * K, "k": H * K}, state.conv, segment_ids)
        q, k = unit(split_heads(q, K)), unit(split_heads(k, K))
        v = split_heads(projection(H * V, "v_proj", self)(x), V)
        wide = accumulator(x.dtype)
        gate = lambda name: projection(H, f"{name}_proj", self, use_bias=True)(x).astype(wide)
        start = nn.initializers.constant(np.log(np.expm1(0.75)))
        ridge = nn.softplus(self.param("ridge", start, (H, K), self.param_dtype).astype(wide)) + 0.25
        o, memory = ops.mesa(
            q, k, v, nn.sigmoid(gate("beta")), jax.nn.log_sigmoid(gate("decay")), ridge,
            steps=self.solver_steps, initial_state=state.memory, segment_ids=segment_ids, chunk_size=self.chunk_size,
            impl=self.impl,
        )  # fmt: skip
        y = head_readout(self, o, x)
        memory = jax.tree.map(lambda new, old: new.astype(old.dtype), memory, state.memory)
        return y, MesaNetState(memory, conv)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> MesaNetState:
        H, (K, V) = self.num_heads, self._sizes()
        zeros = lambda width: jnp.zeros((batch_size, H, K, width), accumulator(dtype))
        conv = empty_convolutions(self, batch_size, (H * K, H * K), dtype)
        return MesaNetState(ops.MesaState(zeros(K), zeros(V)), conv)

    @nn.nowrap
    def _sizes(self) -> tuple[int, ...]:
        """Key width and value width per head."""
        at_least(self, solver_steps=1)
        return self.head_widths(self.num_heads, expand_k=self.expand_k, expand_v=self.expand_v)
