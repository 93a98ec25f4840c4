"""What came just before, for mixers that blend it into every token."""

import numpy as np

from ..ops.convolution import taps
from ..shapes import Array, Float, Int, typed, zeros_from
from .mixer import check_place


@typed
def token_shift(
    x: Float[Array, "B T D"], before: Float[Array, "B 1 D"], segment_ids: Int[Array, "B T"] | None = None
) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 D"]]:
    """x_{t-1} − x_t, where zero stands in front of a sequence; and the last token, which is the state."""
    (previous, _), last = taps(x, zeros_from(x, before.shape, x.dtype, plus=before), segment_ids)
    return previous - x, last.astype(before.dtype)


def first_shares(width: int, layer: int, num_layers: int, power: float) -> np.ndarray:
    """How much of the token before it a channel takes at first: the more, the lower the channel and the layer.

    1 − (i / D)^(power · (1 − layer / num_layers)), as RWKV's authors start their models.
    """
    check_place(layer, num_layers)
    return 1 - (np.arange(width) / width) ** (power * (1 - layer / num_layers))
