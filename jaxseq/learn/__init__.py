"""Learning rules other than back-propagation, beside the gradient they are compared with."""

from .hidden_markov import HiddenMarkovState as HiddenMarkovState
from .hidden_markov import best_fit as best_fit
from .hidden_markov import expectation_maximisation as expectation_maximisation
from .hidden_markov import gradient_ascent as gradient_ascent
from .hidden_markov import hidden_markov_start as hidden_markov_start
