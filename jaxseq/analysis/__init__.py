"""Measures on models and what they infer."""

from .matching import matched_states as matched_states
