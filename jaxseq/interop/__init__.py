"""Weights of other libraries as parameters of ours."""

from .fla import fla_layer as fla_layer
