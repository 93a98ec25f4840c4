"""Measures on models and what they infer."""

from .associative_recall import Interval as Interval
from .associative_recall import bootstrap as bootstrap
from .associative_recall import gap_closed as gap_closed
from .associative_recall import recall_hits as recall_hits
from .associative_recall import share_of_gap as share_of_gap
from .associative_recall import sliced_perplexity as sliced_perplexity
from .bits_per_byte import BitsPerByte as BitsPerByte
from .decoding import decoding_speeds as decoding_speeds
from .decoding import state_bytes as state_bytes
from .laziness import effective_rank as effective_rank
from .laziness import gram_alignment as gram_alignment
from .laziness import kernel_alignment as kernel_alignment
from .laziness import representation_alignment as representation_alignment
from .laziness import tangent_kernel as tangent_kernel
from .matching import matched_states as matched_states
from .self_ensemble import self_ensemble as self_ensemble
from .timescales import Timescale as Timescale
from .timescales import autocorrelation as autocorrelation
from .timescales import autocorrelation_timescale as autocorrelation_timescale
from .timing import Case as Case
from .timing import Timing as Timing
from .timing import exponent as exponent
from .timing import in_turns as in_turns
from .timing import side_by_side as side_by_side
from .timing import timed as timed
from .token_nats import TokenNats as TokenNats
