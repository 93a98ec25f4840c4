"""The causal depthwise convolution that stands in front of many recurrences."""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..shapes import Array, Float, Int, typed
from .initialisers import symmetric_uniform
from .projection import projection


class ShortConvolution(nn.Module):
    """`ops.short_convolution` with its parameters; SiLU if `activated`. The state is the last window − 1 inputs."""

    window: int = 4
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    activated: bool = True

    @nn.compact
    @typed
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: Float[Array, "B _ D"] | None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B _ D"]]:
        width = x.shape[-1]
        kernel = self.param("kernel", symmetric_uniform(self.window**-0.5), (self.window, width), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (width,), self.param_dtype) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y, final = ops.short_convolution(x, kernel, bias, initial_state=state, segment_ids=segment_ids)
        return nn.silu(y) if self.activated else y, final if state is None else final.astype(state.dtype)


def convolved(
    module: nn.Module,
    x: Array,
    widths: dict[str, int],
    states: tuple,
    segment_ids,
    silu: Literal["always", "convolved", "never"] = "always",
) -> tuple[list, tuple]:
    """A projection `name_proj` of x for every width and, where the module has a `conv_window`, its convolution.

    SiLU comes last: "always", only where there is a convolution ("convolved"), or "never".
    """
    projected = [projection(width, f"{name}_proj", module)(x) for name, width in widths.items()]
    if not module.conv_window:
        return [nn.silu(x) if silu == "always" else x for x in projected], ()
    convolve = lambda name, x, before: ShortConvolution(
        module.conv_window,
        activated=silu != "never",
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        name=f"{name}_conv",
    )(x, before, segment_ids)
    outputs, states = zip(*map(convolve, widths, projected, states), strict=True)
    return list(outputs), states


def empty_convolutions(module: nn.Module, batch_size: int, widths: tuple[int, ...], dtype) -> tuple:
    """The states of `convolved` at the start of a sequence.

    Raises:
      ValueError: the module has a `conv_window` below 1.
    """
    window = module.conv_window
    if window is None:
        return ()
    if window < 1:
        raise ValueError(f"conv_window={window}; {type(module).__name__} takes 1 or more.")
    return tuple(jnp.zeros((batch_size, window - 1, width), dtype) for width in widths)
