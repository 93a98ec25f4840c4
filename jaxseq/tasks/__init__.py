"""Synthetic tasks as pure functions of a key."""

from .switching_spikes import SwitchingSpikes as SwitchingSpikes
from .switching_spikes import switching_spikes as switching_spikes
