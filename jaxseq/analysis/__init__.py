"""Measures on models and what they infer."""

from .bits_per_byte import BitsPerByte as BitsPerByte
from .decoding import decoding_speeds as decoding_speeds
from .decoding import state_bytes as state_bytes
from .matching import matched_states as matched_states
from .timing import Case as Case
from .timing import Timing as Timing
from .timing import exponent as exponent
from .timing import in_turns as in_turns
from .timing import side_by_side as side_by_side
from .timing import timed as timed
