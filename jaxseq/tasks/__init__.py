"""Synthetic tasks as pure functions of a key."""

from .bit_memory import match_bits as match_bits
from .bit_memory import matches_last as matches_last
from .bit_memory import parity_bits as parity_bits
from .bit_memory import parity_of_last as parity_of_last
from .copying import compression as compression
from .copying import induction as induction
from .copying import selective_copying as selective_copying
from .decisions import delayed_match as delayed_match
from .decisions import two_choices as two_choices
from .drifting_sensor import drifting_sensor as drifting_sensor
from .fuzzy_recall import fuzzy_recall as fuzzy_recall
from .lagged_copies import lagged_copies as lagged_copies
from .listops import listops as listops
from .matching import match_sums as match_sums
from .reactor import decaying_peaks as decaying_peaks
from .reactor import reactor as reactor
from .reactor import reactor_energy as reactor_energy
from .reactor import reactor_path as reactor_path
from .recall import associative_recall as associative_recall
from .recall import mqar as mqar
from .recall import noisy_recall as noisy_recall
from .reset_recall import reset_recall as reset_recall
from .spike_adding import spike_adding as spike_adding
from .spike_adding import spike_templates as spike_templates
from .switching_spikes import SwitchingSpikes as SwitchingSpikes
from .switching_spikes import switching_spikes as switching_spikes
