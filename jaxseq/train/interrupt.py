"""Leaving in good order: a signal asks the loop to stop, and the process ends with exit code 0."""

import os
import signal
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Interrupted(SystemExit):
    """Training stopped by a signal after `step` steps, its state saved. Uncaught, it ends the process with code 0."""

    def __init__(self, step: int):
        super().__init__(0)
        self.step = step

    def __str__(self) -> str:
        return f"interrupted after step {self.step}"


class StopSignal:
    """Between enter and exit the first SIGINT or SIGTERM is only noted; a second one acts as it did before."""

    def __init__(self, every: int):
        self._every = every  # steps between agreements of several processes
        self._noted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, *_):
        self._noted = True
        self.__exit__()
        os.write(
            2, b"\nstopping after this step; a second signal leaves at once\n"
        )  # print may be what was interrupted

    def requested(self, step: int) -> bool:
        """Whether to stop after this step: processes that compute together must all stop at the same one."""
        if jax.process_count() == 1:
            return self._noted
        return step % self._every == 0 and bool(multihost_utils.process_allgather(np.asarray(self._noted)).any())
