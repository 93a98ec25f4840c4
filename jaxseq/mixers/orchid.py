"""Orchid: convolution over all of the sequence, with a kernel that a small network makes of the sequence."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..layers.initialisers import log_uniform, symmetric_uniform
from ..layers.mixer import Mixer, at_least, stateless
from ..layers.positional_kernel import PositionalKernel
from ..layers.projection import projection
from ..layers.short_convolution import ShortConvolution
from ..ops.input_spectrum import centred_convolution, correlation_spectrum, magnitude_spectrum, spectral_convolution
from ..ops.lag_correlation import LagState, lag_correlation
from ..shapes import Array, Bool, Float, Int, accumulator, check_width, typed
from ..sharded import check_whole

CONDITIONING = ("magnitude", "correlation", "none")


class Orchid(nn.Module):
    """A circular convolution whose kernel depends on the sequence, between two gates (arXiv 2402.18508).

        s₁, s₂, v = conv(x W_in + b)        y = (s₂ ⊙ F⁻¹((h + F h₀) ⊙ F(s₁ ⊙ v))) W_out + b

        h = conv |F conv(v')|                           `conditioning` "magnitude", type I, eq. 2
        h = conv(F*(conv_k(v')) ⊙ F(conv_q(v')))        "correlation", type II, eq. 3
        h = 0                                           "none": what is left is the same for every sequence

    v' is v before its short convolution, h₀ a `PositionalKernel` of the signed lag, and all convolutions are depthwise,
    of odd windows. A shift of the sequence around its end shifts y alike where `padding` is "circular" and `transform`
    "dft"; it does not with padding "zero", nor with "dct". With `ortho` the transform of the conditioning keeps the
    norm. Every output sees the whole sequence: there is no state, and `__call__` alone.

    With `context`, of x's shape, the kernel is made of that (remark 3.3). What `mask` leaves out of x, and
    `context_mask` of the context, adds nothing, but its length counts: a sequence padded is not the sequence alone. h₀
    stretches with it.

    Raises:
      ValueError: a field is unknown, a window even, x is empty, there are segments, which a transform joins, or a mask
        of a context that there is not.
      NotImplementedError: time is split over devices, or a state is asked for.
    """

    d_model: int
    conditioning: str = "correlation"
    window: int = 3
    short_window: int = 3
    padding: str = "circular"
    transform: str = "dft"
    ortho: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        mask: Bool[Array, "B T"] | None = None,
        context: Float[Array, "B T D"] | None = None,
        context_mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        check_width(x, self.d_model, "Orchid")
        check_whole("Orchid", "give every device whole sequences")
        if segment_ids is not None:
            raise ValueError("segment_ids: Orchid's transform joins all of a row; give one sequence a row.")
        if self.conditioning not in CONDITIONING:
            raise ValueError(f"conditioning={self.conditioning!r} is unknown; choose one of {', '.join(CONDITIONING)}.")
        at_least(self, window=1, short_window=1)
        if context is None and context_mask is not None:
            raise ValueError("context_mask: there is no context that it could leave something out of.")
        by = lambda mask: lambda a: a if mask is None else jnp.where(mask[..., None], a, 0)
        counted, of_context = by(mask), by(mask if context is None else context_mask)
        project = _projection(3 * self.d_model, "in_proj", self)
        streams = counted(project(x))
        seen = streams if context is None else of_context(project(context))
        first, second, v = jnp.split(self._convolved(streams, "short", self.short_window), 3, axis=-1)
        spectrum = self._spectrum(seen[..., -self.d_model :], of_context)
        place = jnp.arange(x.shape[1], dtype=jnp.float32)
        signed = (place + x.shape[1] // 2) % x.shape[1] - x.shape[1] // 2
        z = spectral_convolution(
            counted(first * v), spectrum, _kernel(self)(signed, x.shape[1]), transform=self.transform
        )
        return _projection(self.d_model, "out_proj", self)(second * z)

    def _spectrum(self, v, counted):
        """Of the kernel that the sequence makes; None for none."""
        convolved = lambda name: counted(self._convolved(v, name, self.window))
        options = dict(transform=self.transform, ortho=self.ortho)
        if self.conditioning == "none":
            return None
        over_frequency = self._weight("frequency", self.window, self.d_model)
        if self.conditioning == "magnitude":
            return magnitude_spectrum(convolved("time"), over_frequency, **options)
        return correlation_spectrum(convolved("key"), convolved("query"), over_frequency, **options)

    def _convolved(self, x, name: str, window: int):
        return centred_convolution(x, self._weight(name, window, x.shape[-1]).astype(x.dtype), padding=self.padding)

    def _weight(self, name: str, window: int, width: int):
        return self.param(f"{name}_conv", symmetric_uniform(window**-0.5), (window, width), self.param_dtype)

    prefill, step, init_state = stateless(
        "Orchid is not causal, it has no state; CausalOrchid is and has.", "prefill", "step", "init_state"
    )


class CausalOrchidState(NamedTuple):
    """Of the correlation, and the last inputs of the convolutions."""

    lags: LagState
    short: Float[Array, "B S-1 3D"]
    conditioning: Float[Array, "B C-1 D"]


class CausalOrchid(Mixer):
    """Orchid's correlation made causal: a sum that decays, of `num_lags` lags (the paper leaves it open).

        s₁, s₂, v = conv(x W_in + b)        q, k = conv_q(v'), conv_k(v')
        c_t[τ] = λ c_{t-1}[τ] + q_t k_{t-τ}        z_t = Σ_τ (h₀[τ] + c_t[τ]) (s₁ ⊙ v)_{t-τ}
        y = (s₂ ⊙ z) W_out + b

    v' is v before its short convolution, h₀ a `PositionalKernel`, λ one number a channel, and all convolutions look
    back. It finds the lag at which a pattern comes again, up to `num_lags` tokens, and reads the value there. q is
    scaled by ((1 − λ²) / W)^½, so that of independent tokens z has the variance of one, whatever λ and the W lags.
    """

    d_model: int
    num_lags: int = 64
    window: int = 3
    short_window: int = 3
    chunk_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        convolution = lambda window, name: ShortConvolution(
            window, dtype=self.dtype, param_dtype=self.param_dtype, activated=False, name=name
        )
        streams = _projection(3 * self.d_model, "in_proj", self)(x)
        seen = streams[..., -self.d_model :]
        convolved, short = convolution(self.short_window, "short")(streams, state.short, segment_ids)
        first, second, v = jnp.split(convolved, 3, axis=-1)
        query, before = convolution(self.window, "query")(seen, state.conditioning, segment_ids)
        key, _ = convolution(self.window, "key")(seen, state.conditioning, segment_ids)
        rate = self.param("log_rate", log_uniform(1e-3, 0.1), (self.d_model,), self.param_dtype)
        log_decay = -jnp.exp(rate.astype(accumulator(rate.dtype)))
        scale = jnp.sqrt(-jnp.expm1(2 * log_decay) / self.num_lags)
        kernel = _kernel(self)(jnp.arange(self.num_lags, dtype=jnp.float32), self.num_lags)
        z, lags = lag_correlation(
            query * scale.astype(query.dtype)[None, None], key, first * v, log_decay, kernel, initial_state=state.lags,
            segment_ids=segment_ids, chunk_size=self.chunk_size, impl=self.impl,
        )  # fmt: skip
        y = _projection(self.d_model, "out_proj", self)(second * z)
        kept = jax.tree.map(lambda new, old: new.astype(old.dtype), lags, state.lags)
        return y, CausalOrchidState(kept, short, before)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> CausalOrchidState:
        at_least(self, num_lags=1, window=1, short_window=1)
        zeros = lambda length, width: jnp.zeros((batch_size, length, width), dtype)
        lags = LagState(*(zeros(n, self.d_model) for n in (self.num_lags, self.num_lags - 1, self.num_lags - 1)))
        return CausalOrchidState(
            lags, zeros(self.short_window - 1, 3 * self.d_model), zeros(self.window - 1, self.d_model)
        )


def _projection(features: int, name: str, module: nn.Module) -> nn.Dense:
    return projection(features, name, module, use_bias=True, kernel_init=nn.initializers.lecun_normal())


def _kernel(module) -> PositionalKernel:
    return PositionalKernel(module.d_model, param_dtype=module.param_dtype, name="static")
