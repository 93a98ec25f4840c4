"""Normalisation inside each head."""

import flax.linen as nn


def head_norm(module: nn.Module, num_heads: int, epsilon: float, use_bias: bool = True) -> nn.GroupNorm:
    """LayerNorm over the channels of each head, of `B T D` and of one token at a time, in the module's dtypes."""
    return nn.GroupNorm(
        num_heads, epsilon=epsilon, use_bias=use_bias, dtype=module.dtype, param_dtype=module.param_dtype,
        reduction_axes=(-1,), use_fast_variance=False, name="norm",
    )  # fmt: skip
