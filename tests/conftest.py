"""What every test runs under: eight CPU devices, strict promotion, one compilation cache, a time limit that turns
a hang into a trace."""

import faulthandler
import os
import tempfile

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # both: see experiments/__init__.py
os.environ.setdefault("NPROC", "32")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # what one test compiled, others load, in whichever process
    COMPILED = tempfile.TemporaryDirectory(prefix="jaxseq")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_threefry_partitionable", True)


@pytest.fixture(autouse=True)
def time_limit():
    faulthandler.dump_traceback_later(600, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def key():
    return jax.random.key(0)
