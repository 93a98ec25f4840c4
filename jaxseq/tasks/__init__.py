"""Synthetic tasks as pure functions of a key."""

from .bit_memory import match_bits as match_bits
from .bit_memory import matches_last as matches_last
from .bit_memory import parity_bits as parity_bits
from .bit_memory import parity_of_last as parity_of_last
from .copying import compression as compression
from .copying import induction as induction
from .copying import selective_copying as selective_copying
from .drifting_sensor import drifting_sensor as drifting_sensor
from .fuzzy_recall import fuzzy_recall as fuzzy_recall
from .lagged_copies import lagged_copies as lagged_copies
from .listops import listops as listops
from .matching import match_sums as match_sums
from .recall import associative_recall as associative_recall
from .recall import mqar as mqar
from .recall import noisy_recall as noisy_recall
from .reset_recall import reset_recall as reset_recall
from .switching_spikes import SwitchingSpikes as SwitchingSpikes
from .switching_spikes import switching_spikes as switching_spikes
from .variate_chain import variate_chain as variate_chain
