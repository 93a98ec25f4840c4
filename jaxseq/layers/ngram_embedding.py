"""What a token and the few before it mean together, looked up in a table."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..ops.convolution import taps
from ..shapes import Array, Float, Int, typed

# 2³² / golden ratio, made odd so that no bit of a token is lost: multiplicative hashing, Knuth, TAOCP 3, section 6.4.
MULTIPLIER = 2654435769


class NgramEmbedding(nn.Module):
    """Σ_n table[hash of the n-gram that ends at a token] over the `sizes` n (BLT, arXiv 2412.09871, section 3.2.1).

    The memory of a far larger model at the cost of a look-up. All n-grams share one table of `buckets` rows; those
    that collide share a row. The state is the last max(n) − 1 tokens, each stored as
    token + 1; 0 is none.
    """

    d_model: int
    sizes: tuple[int, ...]
    buckets: int
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self, tokens: Int[Array, "B T"], before: Int[Array, "B _"], segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Int[Array, "B _"]]:
        if min(self.sizes, default=0) < 2 or self.buckets < 1:
            raise ValueError(
                f"sizes={self.sizes} and buckets={self.buckets}; NgramEmbedding takes sizes of 2 or more and 1 bucket "
                "or more."
            )
        normal = nn.initializers.normal(0.02)
        table = self.param("embedding", normal, (self.buckets, self.d_model), self.param_dtype)
        shifted, after = taps(tokens + 1, before, segment_ids)
        rows, code = [], jnp.zeros(tokens.shape, jnp.uint32)
        for n, tap in enumerate(reversed(shifted), start=1):
            code = (code + tap.astype(jnp.uint32)) * jnp.uint32(MULTIPLIER)
            code = code ^ (code >> 15)  # a product's high bits are the well-mixed ones; the remainder reads the low
            if n in self.sizes:
                rows.append(code % self.buckets)
        return table[jnp.stack(rows).astype(jnp.int32)].sum(0), after
