"""Every kernel through the compiler of an accelerator that is not there; `test_kernel_compilers.py` runs it.

Prints a line of JSON for each: what it is, its scoped memory on a TPU, its registers and spilled bytes a thread on an
H100, and the seconds; of kernels by name, or of all. A process of its own, as a compiler may take it down.
"""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from families import abstract_gpu
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import ATTENTION, CHANNELS, DISTINCT, MATRIX, attention_inputs, channel_inputs, matrix_inputs, shared

from jaxseq import ops
from pallas_kernels.tiles import tried

PLATFORM, DUMP, *NAMES = sys.argv[1:]
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 80000000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


#: What names end in: of a decoding step, of few sequences, whose time is split, of attention without segments, of SSD's
#: keys, twice as wide as values and one for all heads, and of what Triton compiles where Mosaic has no pipeline.
STEP, LONG, UNPACKED, SSD, EARLIER = ", one token", ", long", ", unpacked", ", SSD", ", before Hopper"
WIDTHS = (64, 128, 256)
IN_SPLITS = ("gla per head", "delta_rule per channel", "linear_recurrence complex", "selective_scan")


def device():
    if PLATFORM == "cuda":
        return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100)
    return topologies.get_topology_desc(platform="tpu", topology_name=PLATFORM)


def call(name: str, width: int):
    """The op and its arguments: bfloat16 tokens, float32 decays."""
    name, comma, kind = name.partition(", ")
    kind = comma + kind
    batch, length = (1, 4096) if kind == LONG else (2, 1 if kind == STEP else 256)
    if name in ATTENTION:
        packed = {} if kind == UNPACKED else {"segment_ids": jnp.zeros((2, 256), jnp.int32)}
        op = partial(ops.softmax_attention, **ATTENTION[name], **packed)
        inputs = attention_inputs(256, K=width, V=width)
        inputs = {name: x.astype(jnp.bfloat16) for name, x in inputs.items()}
    elif name in CHANNELS:
        op, complex_ = CHANNELS[name]
        inputs, _ = channel_inputs(op, length, B=batch, D=8 * width, N=16, complex_=complex_)
        inputs = {k: x.astype(jnp.bfloat16) if k in ("x", "B", "C") else x for k, x in inputs.items()}
    else:
        op, decay = MATRIX[name]
        inputs, _ = matrix_inputs(op, length, decay, K=2 * width if kind == SSD else width, V=width, B=batch)
        inputs = shared(inputs) if kind == SSD else inputs
        narrow = inputs.keys() - {"log_decay", "initial_state"}
        inputs = {k: x.astype(jnp.bfloat16) if k in narrow else x for k, x in inputs.items()}
    return op, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)


def functions(op):
    forward = lambda inputs: op(**inputs, impl="pallas")
    ones = lambda like: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), like)
    backward = lambda inputs: jax.vjp(forward, inputs)[1](ones(jax.eval_shape(forward, inputs)))
    return {"forward": forward, "backward": backward}


def on_tpu(text: str) -> dict:
    """The scoped memory of the largest kernel, bytes."""
    sizes = [int(size) for size in re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', text)]
    return {"scoped_bytes": max(sizes, default=0), "kernels": text.count("tpu_custom_call")}


def on_gpu() -> dict:
    """Registers and spills of the worst kernel, by ptxas: Mosaic leaves its report, and Triton's PTX is given to it."""
    accounts = [file.read_text() for file in Path(DUMP).glob("*.ptxas")]
    (ptxas,) = {p.resolve() for root in sys.path for p in Path(root).glob("nvidia/cuda_nvcc/bin/ptxas")}
    for file in Path(DUMP).glob("*.ptx"):
        if not file.with_suffix(".ptxas").exists() and re.search(r"\.entry kernel", file.read_text()):
            command = [ptxas, "-v", "-arch=sm_90a", file, "-o", os.devnull]
            accounts.append(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
    worst = lambda pattern: max((int(n) for account in accounts for n in re.findall(pattern, account)), default=0)
    return {
        "registers": worst(r"Used (\d+) registers"),
        "spilled_bytes": worst(r"(\d+) bytes spill stores"),
        "kernels": len(accounts),
    }


def empty(folder: str) -> None:
    for file in Path(folder).glob("*.*"):
        if file.is_file():
            file.unlink()


def main():
    mesh = Mesh(np.array(device().devices)[:1], ("x",))
    whole = NamedSharding(mesh, P())
    on_cuda = [(IN_SPLITS, LONG), (("linear_recurrence", "linear_recurrence complex"), EARLIER)]
    variants = [(DISTINCT, STEP), (ATTENTION, UNPACKED), (("gla per head",), SSD), *on_cuda * (PLATFORM == "cuda")]
    names = (*DISTINCT, *CHANNELS, *ATTENTION, *(name + kind for names, kind in variants for name in names))
    for name in NAMES or names:
        for width in WIDTHS:
            op, inputs = call(name, width)
            if name.partition(", ")[0] in CHANNELS and width > 64:
                continue
            for direction, function in functions(op).items():
                if direction == "backward" and name.endswith(STEP):
                    continue  # which is XLA's
                empty(DUMP)
                start = time.perf_counter()
                by_triton = tried("in_pipeline", "gpu", steps=0) if name.endswith(EARLIER) else nullcontext()
                with by_triton, abstract_gpu() if PLATFORM == "cuda" else nullcontext():
                    lowered = jax.jit(function, in_shardings=whole, out_shardings=whole).trace(inputs)
                platform = "cuda" if PLATFORM == "cuda" else "tpu"
                compiled = lowered.lower(lowering_platforms=(platform,)).compile()
                seconds = round(time.perf_counter() - start, 1)
                found = on_gpu() if PLATFORM == "cuda" else on_tpu(compiled.as_text())
                row = {"platform": PLATFORM, "kernel": name, "width": width, "direction": direction}
                print(json.dumps(row | found | {"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
