"""What mixers of long convolutions share."""

from ..ops.online_convolution import ConvolutionState, empty_convolution


def check_length(owner: str, length: int, max_length: int) -> None:
    if length > max_length:
        raise ValueError(f"x has {length} tokens; {owner}(max_length={max_length}) takes at most as many in a call.")


def empty_filter_state(owner: str, batch_size: int, taps: int, width: int, max_length, dtype) -> ConvolutionState:
    """Room for all taps, or for `max_length` tokens: where more come, they are a window, as of attention's cache."""
    if taps < 1:
        raise ValueError(f"max_length={taps}; {owner} takes 1 or more.")
    if max_length is not None and max_length < 0:
        raise ValueError(f"max_length={max_length}; the state of {owner} takes 0 or more.")
    return empty_convolution(batch_size, taps if max_length is None else min(taps, max_length), width, dtype)
