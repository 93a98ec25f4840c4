"""What mixers of long convolutions share."""

from ..ops.online_convolution import ConvolutionState, empty_convolution


def check_length(owner: str, length: int, max_length: int) -> None:
    if length > max_length:
        raise ValueError(f"x has {length} tokens; {owner}(max_length={max_length}) takes at most as many in a call.")


def empty_filter_state(owner: str, batch_size: int, taps: int, width: int, max_length, dtype) -> ConvolutionState:
    """Room for all taps, or where `max_length` is 0 and nothing will follow, for none."""
    if taps < 1:
        raise ValueError(f"max_length={taps}; {owner} takes 1 or more.")
    return empty_convolution(batch_size, 0 if max_length == 0 else taps, width, dtype)
