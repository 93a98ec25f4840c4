"""Hidden states have no names: which inferred state is which true one."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def matched_states(true, inferred, num_states: int) -> tuple[np.ndarray, float]:
    """`(found, accuracy)`: inferred state found[s] is the true state s in the matching under which most bins agree.

    Raises:
      ValueError: shapes disagree, or a state is not in 0 … num_states − 1.
    """
    true, inferred = np.asarray(true), np.asarray(inferred)
    if true.shape != inferred.shape:
        raise ValueError(f"true has shape {true.shape} and inferred {inferred.shape}; both hold a state a bin.")
    for name, states in (("true", true), ("inferred", inferred)):
        if states.size == 0 or states.min() < 0 or states.max() >= num_states:
            raise ValueError(f"{name} has to hold states from 0 to {num_states - 1}, one at least.")
    together = np.zeros((num_states, num_states), np.int64)
    np.add.at(together, (true.ravel(), inferred.ravel()), 1)
    rows, found = linear_sum_assignment(-together)
    return found, float(together[rows, found].sum() / true.size)
