"""What every test runs under: eight CPU devices, quick compilation, strict promotion, one compilation cache, a time
limit that turns a hang into a trace."""

import faulthandler
import gc
import os
import runpy
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # both: see experiments/__init__.py
os.environ.setdefault("NPROC", "32")
# Most of the time is compilation: a third of it is left, and the same mathematics. What XLA_FLAGS says comes last, and
# so holds; jaxlib 0.11 has fusion emitters alone.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
        os.environ.get("XLA_FLAGS", ""),
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # what one test compiled, others load, in whichever process
    COMPILED = tempfile.TemporaryDirectory(prefix="jaxseq")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}

import jax
import pytest

gc.set_threshold(50_000)  # tracing makes many objects that stay, and Python looks through all of them for garbage
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_threefry_partitionable", True)


@pytest.fixture(autouse=True)
def time_limit():
    faulthandler.dump_traceback_later(600, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def little_garbage():
    """A read of a checkpoint that fails collects garbage: not among all that the tests before left, for seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def key():
    return jax.random.key(0)


# ---- for the experiments -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    """Runs a script in a process of its own."""

    def completed(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=500)

    return completed


@pytest.fixture
def run_here(capsys, monkeypatch):
    """Runs a script that has nothing to compute in this process: the exit code, and what it wrote."""

    def completed(name: str, *arguments: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        code = 0
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as leaving:
            code = leaving.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return completed


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog; " * 400)
    return folder
