"""What a practitioner would try first on a window `B L V` for a forecast `B S V`."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..layers.instance_norm import instance_normalised
from ..layers.mlp import MLP
from ..layers.projection import fan_in_projection
from ..layers.self_attention import SelfAttention
from ..mixers.mamba import Mamba
from ..shapes import Array, Float, accumulator, typed
from ._checks import check_finite, check_fitted, check_forecaster
from .block import Slot, Stack


@typed
def last_value(x: Float[Array, "B L V"], horizon: int) -> Float[Array, "B S V"]:
    """The last value again and again: the best forecast of a random walk."""
    return jnp.repeat(x[:, -1:], horizon, axis=1)


@typed
def window_mean(x: Float[Array, "B L V"], horizon: int) -> Float[Array, "B S V"]:
    return jnp.repeat(x.mean(axis=1, keepdims=True), horizon, axis=1)


@typed
def seasonal_naive(x: Float[Array, "B L V"], horizon: int, period: int) -> Float[Array, "B S V"]:
    """The last `period` steps again and again.

    Raises:
      ValueError: a period is no number from 1 to the L steps there are.
    """
    if not 1 <= period <= x.shape[1]:
        raise ValueError(f"period={period} must be at least 1 and at most the {x.shape[1]} steps of a window.")
    return jnp.tile(x[:, -period:], (1, -(-horizon // period), 1))[:, :horizon]


class LinearForecaster(nn.Module):
    """One linear map over time for all variates (arXiv 2205.13504).

    With `window` w one for the trend, a mean over w steps whose ends are repeated, and one for the rest: DLinear. With
    `normalise` on windows of mean 0 and variance 1: RLinear (arXiv 2305.10721).

    Raises:
      ValueError: `horizon` is below 1, `window` is even, x has no step or no variate, another lookback than the
        parameters are for, or is not finite where it is known, as it is outside `jit`.
    """

    horizon: int
    window: int | None = 25
    normalise: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B L V"]) -> Float[Array, "B S V"]:
        check_forecaster(self, x)
        x, restored = instance_normalised(x) if self.normalise else (x, lambda y: y)
        for name in self._parts(x):
            check_fitted(self, name, x.shape[1], "steps")
        forecast = lambda name, x: fan_in_projection(self.horizon, name, self, x.shape[1])(x.swapaxes(1, 2))
        forecasts = [forecast(name, part) for name, part in self._parts(x).items()]
        return restored(jnp.sum(jnp.stack(forecasts), axis=0).swapaxes(1, 2))

    def solved(self, batches: Iterable[Mapping[str, Array]], *, ridge: float = 1e-4) -> Any:
        """The parameters of least squared error over all `inputs B L V` and `targets B S V`, in closed form.

            W = (Σ z zᵀ + λ I)⁻¹ Σ z yᵀ

        z are the parts of a window of one variate, and 1 for the bias, in the units of the targets y; λ is `ridge` of
        the mean of z². Gradient descent stops short of these.

        Raises:
          ValueError: there are no batches, targets are of another horizon, or numbers are not finite.
        """
        outer, crossed, length = np.zeros((1, 1)), np.zeros((1, 1)), 0
        names: tuple[str, ...] = ()
        for batch in batches:
            x, targets = jnp.asarray(batch["inputs"]), np.asarray(batch["targets"], np.float64)
            if targets.shape[1] != self.horizon:
                raise ValueError(f"targets has {targets.shape[1]} steps; this forecaster has horizon={self.horizon}.")
            check_finite("LinearForecaster.solved", inputs=x, targets=targets)
            x, restored = instance_normalised(x) if self.normalise else (x, lambda y: y)
            # A shift and a scale of each window restore the targets' units, in which errors count.
            shift, above = (np.asarray(restored(y + jnp.zeros_like(x[:, :1])), np.float64) for y in (0.0, 1.0))
            parts, length = self._parts(x), x.shape[1]
            z = (above - shift) * np.concatenate([*parts.values(), jnp.ones_like(x[:, :1])], axis=1, dtype=np.float64)
            z, y = (rows.swapaxes(1, 2).reshape(-1, rows.shape[1]) for rows in (z, targets - shift))
            outer, crossed, names = outer + z.T @ z, crossed + z.T @ y, tuple(parts)
        if not names:
            raise ValueError("batches is empty; LinearForecaster.solved takes one or more.")
        share = ridge * np.trace(outer) / len(outer)
        *kernels, bias = np.split(
            np.linalg.solve(outer + share * np.eye(len(outer)), crossed), np.arange(1, len(names) + 1) * length
        )
        biases = [bias[0]] + [0 * bias[0]] * (len(names) - 1)
        leaf = lambda a: jnp.asarray(a, self.param_dtype)
        maps = zip(names, kernels, biases, strict=True)
        return {"params": {name: {"kernel": leaf(W), "bias": leaf(b)} for name, W, b in maps}}

    def _parts(self, x: Array) -> dict[str, Array]:
        """What is mapped, by the name of its map."""
        if self.window is None:
            return {"map": x}
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window={self.window}; LinearForecaster takes an odd number of steps, or None.")
        reach = self.window // 2
        padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)), mode="edge")
        trend = nn.pool(padded, 0.0, jax.lax.add, (self.window,), (1,), "VALID") / self.window
        return {"trend_map": trend, "rest_map": x - trend}


class PatchForecaster(nn.Module):
    """Patches of each variate by itself as tokens (PatchTST, arXiv 2211.14730), with LayerNorm where it has BatchNorm.

    The last value is repeated for `stride` steps, so that the last patch is whole. All patches make the forecast.

    Raises:
      ValueError: `horizon` is below 1, not 1 ≤ `stride` ≤ `patch` ≤ L, x has no variate, another number of patches
        than the parameters are for, or is not finite where it is known, as it is outside `jit`.
    """

    horizon: int
    d_model: int = 128
    mixers: tuple[Slot, ...] = (SelfAttention,) * 2
    mlp: Slot = MLP
    patch: int = 16
    stride: int = 8
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B L V"]) -> Float[Array, "B S V"]:
        batch, length, variates = x.shape
        check_forecaster(self, x)
        if not 1 <= self.stride <= self.patch <= length:
            raise ValueError(
                f"patch={self.patch} and stride={self.stride}; PatchForecaster takes 1 ≤ stride ≤ patch ≤ {length}."
            )
        x, restored = instance_normalised(x)
        padded = jnp.pad(x, ((0, 0), (0, self.stride), (0, 0)), mode="edge")
        starts = np.arange(0, length + self.stride - self.patch + 1, self.stride)[:, None]
        patches = padded.swapaxes(1, 2).reshape(batch * variates, -1)[:, starts + np.arange(self.patch)[None]]
        check_fitted(self, "places", len(starts), "patches", leaf="")
        dropped = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        h = fan_in_projection(self.d_model, "encoder", self, self.patch)(patches)
        places = self.param("places", nn.initializers.uniform(0.02), (len(starts), self.d_model), self.param_dtype)
        h = dropped((h + places.astype(h.dtype)[None]).astype(accumulator(h.dtype)))
        names = ("d_model", "mixers", "mlp", "dtype", "param_dtype")
        fields = {name: getattr(self, name) for name in names}
        h, _ = Stack(**fields, norm="layer", norm_eps=1e-5, prenorm=False, remat=False, name="stack")(h)
        h = dropped(h.reshape(batch, variates, -1))
        return restored(fan_in_projection(self.horizon, "head", self, h.shape[-1])(h).swapaxes(1, 2))


class SequenceForecaster(nn.Module):
    """Time steps as tokens, all variates in each, through causal mixers; the last one makes the forecast.

    Raises:
      ValueError: `horizon` is below 1, x has no step or no variate, other variates than the parameters are for, or is
        not finite where it is known, as it is outside `jit`.
    """

    horizon: int
    d_model: int = 128
    mixers: tuple[Slot, ...] = (partial(Mamba, state_size=16),) * 2
    mlp: Slot = None
    normalise: bool = True
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B L V"]) -> Float[Array, "B S V"]:
        check_forecaster(self, x)
        variates = x.shape[2]
        check_fitted(self, "encoder", variates, "variates")
        x, restored = instance_normalised(x) if self.normalise else (x, lambda y: y)
        h = fan_in_projection(self.d_model, "encoder", self, variates)(x)
        h = h.astype(accumulator(h.dtype))  # what layers add to
        names = ("d_model", "mixers", "mlp", "dropout", "dtype", "param_dtype")
        h, _ = Stack(**{name: getattr(self, name) for name in names}, remat=False, name="stack")(h)
        y = fan_in_projection(self.horizon * variates, "head", self, self.d_model)(h[:, -1])
        return restored(y.reshape(len(x), self.horizon, variates))


#: Time steps as tokens, through any mixers: the forecaster that is no paper's own.
Forecaster = SequenceForecaster
