"""What came just before, for mixers that blend it into every token."""

from ..ops.convolution import taps
from ..shapes import Array, Float, Int, typed, zeros_from


@typed
def token_shift(
    x: Float[Array, "B T D"], before: Float[Array, "B 1 D"], segment_ids: Int[Array, "B T"] | None = None
) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 D"]]:
    """x_{t-1} − x_t, where zero stands in front of a sequence; and the last token, which is the state."""
    (previous, _), last = taps(x, zeros_from(x, before.shape, x.dtype, plus=before), segment_ids)
    return previous - x, last.astype(before.dtype)
