"""Recurrence families as functions, arrays in and arrays out."""

from .convolution import long_convolution as long_convolution
from .convolution import short_convolution as short_convolution
from .gated_linear_attention import gated_linear_attention as gated_linear_attention
from .grid_recurrence import contractive as contractive
from .grid_recurrence import coupling_residual as coupling_residual
from .grid_recurrence import grid_recurrence as grid_recurrence
from .linear_recurrence import linear_recurrence as linear_recurrence
from .selective_scan import selective_scan as selective_scan
from .softmax_attention import softmax_attention as softmax_attention
from .state_space import diagonal_kernel as diagonal_kernel
from .state_space import diagonal_state_space as diagonal_state_space
