"""Recurrence families as functions, arrays in and arrays out."""

from .convolution import long_convolution as long_convolution
from .convolution import short_convolution as short_convolution
from .delta_rule import delta_rule as delta_rule
from .dplr_recurrence import dplr_recurrence as dplr_recurrence
from .dplr_state_space import dplr_kernel as dplr_kernel
from .dplr_state_space import dplr_state_space as dplr_state_space
from .gated_linear_attention import gated_linear_attention as gated_linear_attention
from .grid_recurrence import contractive as contractive
from .grid_recurrence import coupling_residual as coupling_residual
from .grid_recurrence import grid_recurrence as grid_recurrence
from .hidden_markov import HiddenMarkovPosterior as HiddenMarkovPosterior
from .hidden_markov import hidden_markov_filter as hidden_markov_filter
from .hidden_markov import hidden_markov_log_likelihood as hidden_markov_log_likelihood
from .hidden_markov import hidden_markov_smoother as hidden_markov_smoother
from .hidden_markov import viterbi as viterbi
from .linear_recurrence import linear_recurrence as linear_recurrence
from .log_matmul import log_matmul as log_matmul
from .log_recurrence import log_recurrence as log_recurrence
from .nonlinear_recurrence import nonlinear_recurrence as nonlinear_recurrence
from .selective_scan import selective_scan as selective_scan
from .softmax_attention import softmax_attention as softmax_attention
from .state_space import diagonal_kernel as diagonal_kernel
from .state_space import diagonal_state_space as diagonal_state_space
from .state_space import mimo_state_space as mimo_state_space
