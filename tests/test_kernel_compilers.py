"""Every kernel compiles for accelerators that are not there, with the makers' own compilers, where they are installed.

`pip install jaxseq[kernels-tpu]` or `jaxseq[kernels-cuda]`; the table is printed with `pytest -s`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: What one kernel may keep on a TPU, of 16 MiB on the smallest one; the most is that of the widest on a v5p.
SCOPED_BYTES = 8 * 2**20
#: What a thread may spill on an H100, by the width of a head. Where it does, registers are what to tune for next.
SPILLED_BYTES = {64: 500, 128: 900, 256: 3_100}
#: Of the kernel with four kinds of rows.
OF_DPLR = {64: 1_000, 128: 1_500, 256: 1_500}


@pytest.mark.parametrize(
    "extra, package, platforms",
    [
        ("tpu", "libtpu", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"]),  # in turn: one process at a time has libtpu
        ("cuda", "jax_cuda12_plugin", ["cuda"]),
    ],
    ids=["tpu", "cuda"],
)
def test_compiles(extra, package, platforms, tmp_path, capfd):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install jaxseq[kernels-{extra}]")
    for platform in platforms:
        rows = compiled(platform, tmp_path)
        with capfd.disabled():
            print()
            for row in rows:
                print("  ".join(f"{name} {value}" for name, value in row.items()))
        assert len(rows) == (122 if platform == "cuda" else 102)  # a TPU splits no time and has one compiler
        for row in rows:
            assert row["kernels"] >= (2 if row["direction"] == "backward" else 1), row
            if platform == "cuda":
                most = (OF_DPLR if row["kernel"].startswith("dplr") else SPILLED_BYTES)[row["width"]]
                assert row["spilled_bytes"] <= most, row
            else:
                assert row["scoped_bytes"] <= SCOPED_BYTES, row


def compiled(platform: str, tmp_path: Path) -> list[dict]:
    script = Path(__file__).with_name("compile_kernels.py")
    nowhere = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    dumps = {"XLA_FLAGS": f"--xla_dump_to={tmp_path}", "MOSAIC_GPU_DUMP_TO": str(tmp_path)}
    environment = os.environ | nowhere | {"JAX_PLATFORMS": "cpu"} | (dumps if platform == "cuda" else {})
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # what is compiled anew is dumped
    command = [sys.executable, script, platform, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"{platform}, after {len(rows)} kernels: {done.stderr[-2000:]}"
    return rows
