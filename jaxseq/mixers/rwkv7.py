"""RWKV-7, Goose."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import constant, orthogonal, zeros

from .. import ops
from ..layers.head_norm import head_norm
from ..layers.initialisers import drawn_wide, symmetric_uniform
from ..layers.low_rank import low_rank
from ..layers.mixer import Mixer, at_least
from ..layers.normalised import unit
from ..layers.projection import projection, split_heads
from ..layers.token_shift import first_shares, token_shift
from ..shapes import Array, Float, Int, accumulator, typed

#: μ_c of channel i starts at 1 − (i / D)^(power · (1 − layer / num_layers)).
POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}

#: Ranks that are None are near these multiples of √d_model.
RANKS = {"decay_rank": 2.5, "a_rank": 2.5, "value_rank": 1.7, "gate_rank": 5.0}


class RWKV7State(NamedTuple):
    matrix: Float[Array, "B H K K"]
    last: Float[Array, "B 1 D"]


class RWKV7(Mixer):
    """A delta rule that erases along one key and writes along another, with a decay per channel (arXiv 2503.14456).

        x^c_t = x_t + (x_{t-1} − x_t) ⊙ μ_c, c = r, w, k, v, a, g        r, k, v = x^r W_r, x^k W_k, x^v W_v
        log w_t = −e^{−½} σ(b_w + tanh(x^w W_w1) W_w2)        a_t = σ(b_a + x^a W_a1 W_a2)        (section 4)
        κ_t = k_t ⊙ k_k / ‖·‖        k̃_t = k_t ⊙ (1 + (a_t − 1) ⊙ k_a)
        S_t = (diag w_t − (a_t ⊙ κ_t) κ_tᵀ) S_{t-1} + k̃_t v_tᵀ        o_t = S_tᵀ r_t
        y_t = ((norm(o_t) + (Σ r_t ⊙ k̃_t ⊙ r_k) v_t) ⊙ σ(x^g W_g1) W_g2) W_o

    The norm is a LayerNorm of each head with ε = 1e-5 K. `layer`, 0 the first, of the `num_layers` of a model sets
    where μ and the decays start. The ranks of decay, a, v and g follow `d_model` when None, as the authors' do.

    It is the authors' time mixing; where their blocks have channel mixing, a `Stack` has its MLP.

    Layers after the first mix their values with its own: with `first_value` `B T D`, which `with_value` of that layer
    returns, v_t + (first_value_t − v_t) ⊙ σ(b_v + x^v W_v1 W_v2) is v_t. In a `Stack` layers whose `layer` is not 0
    take it from the first RWKV7 before them.
    """

    d_model: int
    num_heads: int = 4
    decay_rank: int | None = None
    a_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None
    layer: int = 0
    num_layers: int = 1
    chunk_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @typed
    def prefill(
        self,
        x: Float[Array, "B T D"],
        state: Any,
        segment_ids: Int[Array, "B T"] | None = None,
        first_value: Float[Array, "B T D"] | None = None,
    ):
        return self.with_value(x, state, segment_ids, first_value)[:2]

    def in_stack(self, x, state: Any, segment_ids, handed: dict[str, Array], **inputs):
        first = handed.get("first_value") if self.layer else None
        y, state, value = self.with_value(x, state, segment_ids, first, **inputs)
        return y, state, handed | {"first_value": value if first is None else first}

    @nn.compact
    def with_value(self, x, state: Any, segment_ids: Array | None = None, first_value: Array | None = None):
        """`prefill`, and the values `B T D` of this layer."""
        state = self.resumed(x, state)
        D, K = self.d_model, self._width()
        x = x if self.dtype is None else x.astype(self.dtype)
        shift, last = token_shift(x, state.last, segment_ids)
        parameter = lambda name, start: self.param(name, constant(start), (D,), self.param_dtype)
        vector = lambda name, start: parameter(name, start).astype(x.dtype)[None, None]
        share = lambda power: first_shares(D, self.layer, self.num_layers, power)
        x_r, x_w, x_k, x_v, x_a, x_g = (x + shift * vector(f"mix_{c}", share(power)) for c, power in POWERS.items())
        start = lambda bound: {"kernel_init": symmetric_uniform(bound * D**-0.5)}
        r, k, v = (
            projection(D, f"{name}_proj", self, **start(bound))(x)
            for name, bound, x in (("r", 0.5, x_r), ("k", 0.05, x_k), ("v", 0.5, x_v))
        )
        decay_rank, a_rank, value_rank, gate_rank = self._ranks()
        lift = partial(low_rank, module=self, features=D, down_init=zeros, up_init=drawn_wide(orthogonal(0.1)))
        from_start: Callable[..., Any] = lambda bias: dict(use_bias=True, bias_init=constant(bias))
        a = nn.sigmoid(lift("a", rank=a_rank, **from_start(self._first_a()))(x_a))
        w = lift("decay", rank=decay_rank, activation=nn.tanh, **from_start(self._first_decays()))(x_w)
        if first_value is not None:
            own_share = lift("value", rank=value_rank, **from_start(0.73 - 0.4 * self._line()))(x_v)
            v += (first_value - v) * nn.sigmoid(own_share)
        value = v
        kappa = unit(split_heads(k * vector("k_k", 0.71 - 0.1 * self._line()), K), least=1e-12)
        k = k * (1 + (a - 1) * vector("k_a", 1.02))
        r, k, v, a, w = (split_heads(z, K) for z in (r, k, v, a, w))
        o, matrix = ops.dplr_recurrence(
            r, k, v, -kappa, kappa * a, -np.exp(-0.5) * nn.sigmoid(w.astype(accumulator(w.dtype))),
            scale=1.0, initial_state=state.matrix, segment_ids=segment_ids, chunk_size=self.chunk_size, impl=self.impl,
        )  # fmt: skip
        o = head_norm(self, self.num_heads, 1e-5 * K)(o.reshape(x.shape))
        r_k = self.param("r_k", constant(-0.04), (self.num_heads, K), self.param_dtype)
        o += (jnp.sum(r * k * r_k.astype(r.dtype)[None, None], axis=-1, keepdims=True) * v).reshape(x.shape)
        o *= lift("gate", rank=gate_rank, activation=nn.sigmoid)(x_g)
        y = projection(D, "out_proj", self, kernel_init=zeros)(o)
        return y, RWKV7State(matrix.astype(state.matrix.dtype), last), value

    def _line(self):
        return np.linspace(-0.5, 0.5, self.d_model)

    def _zigzag(self):
        """−1 to 1 in each head, flat in the middle."""
        ramp = np.tile(np.linspace(-1, 1, self._width()), self.num_heads)
        return ramp * np.abs(ramp)

    def _first_decays(self):
        depth = self.layer / max(1, self.num_layers - 1)  # 0 for the first layer, 1 for the last
        return -5.5 + 6 * (self._line() + 0.5) ** (1 + depth**0.3) + 2.5 * self._zigzag()

    def _first_a(self):
        return -0.19 + 0.3 * self._zigzag() + 0.4 * self._line()

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> RWKV7State:
        matrix = jnp.zeros((batch_size, self.num_heads, self._width(), self._width()), accumulator(dtype))
        return RWKV7State(matrix, jnp.zeros((batch_size, 1, self.d_model), dtype))

    @nn.nowrap
    def _ranks(self) -> tuple[int, ...]:
        """Of decay, a, value and gate: multiples of 32 near multiples of √d_model, where they are None."""
        at_least(self, **dict.fromkeys(RANKS, 1))
        near = lambda factor: max(32, 32 * round(factor * self.d_model**0.5 / 32))
        return tuple(near(f) if (rank := getattr(self, name)) is None else rank for name, f in RANKS.items())

    @nn.nowrap
    def _width(self) -> int:
        """Channels a head, of keys as of values."""
        self.checked_heads(num_heads=self.num_heads)
        return self.d_model // self.num_heads
