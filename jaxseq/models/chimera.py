"""Chimera's blocks, and what forecasts and classifies with them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..layers.instance_norm import instance_normalised
from ..layers.projection import fan_in_projection
from ..mixers.chimera import Chimera
from ..shapes import Array, Float, Int, accumulator, typed
from ._checks import check_fitted, check_forecaster, check_window
from .block import counted_tokens

#: Long memories of time, and short ones.
TREND, SEASON = partial(Chimera, dt=(1e-3, 0.05)), partial(Chimera, dt=(0.1, 1.0))


class ChimeraBlock(nn.Module):
    """A slow model, a fast one of what it leaves, and a gate (arXiv 2406.04320, section 3.3).

        τ = trend(z)        s = season(z − τ)        x ← x + ((τ + s) ⊙ silu(z W_g)) W_o        z = RMSNorm(x)

    `trend` and `season` are callables that take `d_model`. The paper's ablations: `season` None is the slow model
    alone, and without `gated` there is no silu(z W_g).
    """

    d_model: int
    trend: Any = TREND
    season: Any = SEASON
    gated: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B T V D"]) -> Float[Array, "B T V D"]:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        z = nn.RMSNorm(name="norm", **dtypes)(x)
        dense = partial(fan_in_projection, self.d_model, module=self, fan_in=self.d_model)
        y = self.trend(d_model=self.d_model, name="trend", **dtypes)(z)
        if self.season is not None:
            y = y + self.season(d_model=self.d_model, name="season", **dtypes)(z - y)
        if self.gated:
            y = y * nn.silu(dense(name="gate_proj")(z))
        return x + dense(name="out_proj")(y).astype(x.dtype)


class ChimeraGrid(nn.Module):
    """Every number of a window `B T V` as a cell of D channels, through blocks: `B T V D`.

    With `remat` blocks are computed again in the backward pass: their states, N times as large as x, are kept of one
    block at a time.
    """

    d_model: int = 16
    depth: int = 2
    trend: Any = TREND
    season: Any = SEASON
    gated: bool = True
    remat: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B T V"]) -> Float[Array, "B T V D"]:
        if self.depth < 1:
            raise ValueError(f"depth={self.depth} must be at least 1.")
        h = fan_in_projection(self.d_model, "encoder", self, 1)(x[..., None])
        h = h.astype(accumulator(h.dtype))  # what layers add to
        names = ("d_model", "trend", "season", "gated", "dtype", "param_dtype")
        fields = {name: getattr(self, name) for name in names}
        block = nn.remat(ChimeraBlock) if self.remat else ChimeraBlock
        for layer in range(self.depth):
            h = block(**fields, name=f"block_{layer}")(h)
        return nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(h)


class ChimeraForecaster(nn.Module):
    """Forecasts of all variates: one linear map of all cells of a variate, of windows of scale 1, scaled back.

    `grid` makes a `ChimeraGrid`, as `partial(ChimeraGrid, d_model=8)` does.

    Raises:
      ValueError: `horizon` is below 1, x has no step or no variate, another lookback than the parameters are for, or is
        not finite where it is known, as it is outside `jit`.
    """

    horizon: int
    grid: Callable = ChimeraGrid
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B L V"]) -> Float[Array, "B S V"]:
        check_forecaster(self, x)
        x, restored = instance_normalised(x)
        h = self.grid(dtype=self.dtype, param_dtype=self.param_dtype, name="grid")(x)
        check_fitted(self, "head", x.shape[1], "steps", each=h.shape[3])
        h = h.swapaxes(1, 2).reshape(*x.shape[::2], -1)
        return restored(fan_in_projection(self.horizon, "head", self, h.shape[-1])(h).swapaxes(1, 2))


class ChimeraClassifier(nn.Module):
    """Logits from the mean over time of every variate's cells; with `lengths` of the first so many of each window.

    `grid` is that of `ChimeraForecaster`.

    Raises:
      ValueError: `num_classes` is below 1; x has no step or no variate, or other variates than the parameters are for;
        where they are known, as they are outside `jit`, x is not finite or a length not from 0 to T.
    """

    num_classes: int
    grid: Callable = ChimeraGrid
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B T V"], lengths: Int[Array, "B"] | None = None) -> Float[Array, "B _"]:
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be at least 1.")
        check_window(self, x)
        h = self.grid(dtype=self.dtype, param_dtype=self.param_dtype, name="grid")(x)
        check_fitted(self, "head", x.shape[2], "variates", each=h.shape[3])
        counted = jnp.ones(x.shape[:2], bool) if lengths is None else counted_tokens(x.shape[1], lengths)
        counted = counted.astype(h.dtype)
        pooled = jnp.einsum("btvd,bt->bvd", h, counted / jnp.maximum(counted.sum(1, keepdims=True), 1))
        pooled = pooled.reshape(len(x), -1)
        return fan_in_projection(self.num_classes, "head", self, pooled.shape[-1])(pooled)
