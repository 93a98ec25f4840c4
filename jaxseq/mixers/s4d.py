"""S4D: one diagonal state space a channel."""

from ..layers.diagonal_state_space import DiagonalStateSpace


class S4D(DiagonalStateSpace):
    """A diagonal state space a channel, then GELU and a gated linear map (arXiv 2206.11893).

        x' = A x + B u,  y = 2 Re(C x) + D u        A = −f(A_real) − i g(A_imag),  dt = exp(log_dt)
        out = a ⊙ σ(b),  (a, b) = GELU(y) W + bias

    `state_size` N counts conjugate pairs in full: N/2 complex states are kept. `initialisation` names how A starts,
    or a tuple of names for the copies in turn; `num_copies` sets of (A, B) are shared by the channels, channel h using
    copy h mod num_copies (None: one a channel). Of "lin", "inv", "quad" and "random", `random_real` draws the real
    parts from −U[0, 1]; `random_imag` draws the n of the imaginary parts of the first three from U[0, N/2]. `rate` r
    reads an input sampled at 1/r of the training rate. `bandlimit` b silences states that turn by b π or more in a
    step: at 1, by more than the sampling can tell apart.
    With `bidirectional` a second kernel, of another C, adds what comes after each token: the mixer looks at the whole
    sequence and has no state. `output` is a gate of `layers.gated_output`, `impl` a form of `ops.diagonal_state_space`.
    The imaginary parts are negative, as in the authors' code.
    """

    output: str = "full_glu"
