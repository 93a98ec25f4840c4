"""Synthetic tasks as pure functions of a key."""

from .lagged_copies import lagged_copies as lagged_copies
from .listops import listops as listops
from .reset_recall import reset_recall as reset_recall
from .switching_spikes import SwitchingSpikes as SwitchingSpikes
from .switching_spikes import switching_spikes as switching_spikes
