"""The inverted transformer: a variate is a token."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..layers.instance_norm import instance_normalised
from ..layers.mixer import stateless
from ..layers.mlp import MLP
from ..layers.projection import fan_in_projection
from ..layers.self_attention import SelfAttention
from ..shapes import Array, Float, accumulator, typed
from ._checks import check_finite, check_fitted, check_forecaster
from .block import Slot, Stack


class ITransformer(nn.Module):
    """Forecasts of all variates, mixed across variates and not over time (arXiv 2310.06625).

        tokens = [x'ᵀ; marksᵀ] W_e + b_e        one for each variate and each mark, x' of scale 1 over the lookback
        H ← LN(H + mixer(H)), H ← LN(H + MLP(H))        a layer
        y = LN(H) W_p + b_p        of each variate's token, scaled back

    Any mixer may stand for attention; one that is causal sees the variates in order. The number of variates may differ
    from call to call. `normalise` is the scale of the window; without it x is taken as it is. `dropout` is of the
    tokens; slots have their own. The authors' settings are 0.1 everywhere, and MLPs no wider than the model.
    """

    horizon: int
    d_model: int = 128
    mixers: tuple[Slot, ...] = (SelfAttention,) * 2
    mlp: Slot = MLP
    normalise: bool = True
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B L V"], marks: Float[Array, "B L C"] | None = None) -> Float[Array, "B S V"]:
        """The lookback `B L V`, and marks of its times `B L C`, to the forecast `B horizon V`.

        Raises:
          ValueError: `horizon` is below 1, x has no variate, or another lookback than the parameters are for; x or
            marks are not finite where they are known, as they are outside `jit`.
        """
        check_forecaster(self, x)
        variates, length = x.shape[2], x.shape[1]
        check_fitted(self, "encoder", length, "steps")
        check_finite("ITransformer", marks=marks)
        x, restored = instance_normalised(x) if self.normalise else (x, lambda y: y)
        x = x if marks is None else jnp.concatenate([x, marks.astype(x.dtype)], axis=2)
        dropped = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        h = dropped(fan_in_projection(self.d_model, "encoder", self, length)(x.swapaxes(1, 2)))
        h = h.astype(accumulator(h.dtype))  # what layers add to
        names = ("d_model", "mixers", "mlp", "dtype", "param_dtype")
        fields = {name: getattr(self, name) for name in names}
        h, _ = Stack(**fields, norm="layer", norm_eps=1e-5, prenorm=False, remat=False, name="stack")(h)
        h = nn.LayerNorm(1e-5, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(h[:, :variates])
        return restored(fan_in_projection(self.horizon, "head", self, self.d_model)(h).swapaxes(1, 2))

    step, init_state = stateless(
        "ITransformer attends over variates and keeps nothing of a window; call it on the last steps.",
        "step",
        "init_state",
    )
