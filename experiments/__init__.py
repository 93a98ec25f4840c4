"""One script per claim. Importing this package prepares the process, before NumPy or JAX start their threads.

Batched LAPACK calls of one XLA program can wait for each other for ever when there are fewer threads than calls. No
hot path of jaxseq makes such a call; these settings keep a user's own `jnp.linalg` safe beside it.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NPROC", "32")
