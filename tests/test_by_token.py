"""Kernels by token on both kinds of accelerator, as far as a CPU can tell: Triton's programs and Mosaic's pipeline."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import abstract_gpu, assert_close, cast
from kernel_cases import CHANNELS, channel_inputs, check, everything
from sampled import by_default

import pallas_kernels.by_token as by_token
from jaxseq import ops
from pallas_kernels import mosaic_gpu
from pallas_kernels.channel_programs import Programs
from pallas_kernels.tiles import tried


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Triton's programs, interpreted."""
    monkeypatch.setattr(by_token, "_on_platforms", lambda f, *arrays: f(Programs("gpu", True), *arrays))


@pytest.mark.parametrize("name", by_default(["linear_recurrence complex", "selective_scan"], CHANNELS))
def test_channels_on_a_gpu(name, on_a_gpu):
    op, complex_ = CHANNELS[name]
    check(op, *channel_inputs(op, 37, complex_=complex_, N=3))


IN_SPLITS = [(name, False) for name in CHANNELS] + [("linear_recurrence complex", True)]


@pytest.mark.parametrize("length", by_default([1000, 544], [1000, 544, 1100]))
@pytest.mark.parametrize("name, reverse", by_default([IN_SPLITS[2], IN_SPLITS[3]], IN_SPLITS))
def test_splits_on_a_gpu(name, reverse, length, on_a_gpu):
    """Long sequences in parts that are walked at once, in both directions, restarting in some of them."""
    op, complex_ = CHANNELS[name]
    inputs, ids = channel_inputs(op, length, D=20, complex_=complex_, N=3)
    op = partial(op, reverse=True) if reverse else op
    with tried("by_token", "gpu", programs=8), tried("by_token_backward", "gpu", programs=16):
        check(op, inputs, ids)
        walks = str(everything(op, ids, "pallas").trace(inputs).jaxpr).count("pallas_call[")
    assert walks == 4 or length % 1000  # in either direction one to find where the parts start


def test_rows_of_bfloat16_on_a_gpu(on_a_gpu):
    """They are read and written as they are; what is computed of them is float32."""
    inputs, ids = channel_inputs(ops.selective_scan, 37)
    inputs |= {name: inputs[name].astype(jnp.bfloat16) for name in ("x", "dt", "B", "C")}
    check(ops.selective_scan, inputs, ids, "bfloat16 gradient")
    before, kernel, *_ = str(everything(ops.selective_scan, ids, "pallas").trace(inputs).jaxpr).split("pallas_call")
    assert "bf16[2,48,40]" in before and "f32[2,48,40]" not in before and "f32[2,48,40]" in kernel


@pytest.fixture
def on_mosaic_gpu(monkeypatch):
    """Mosaic's pipeline, interpreted: what is read before its copy has landed is NaN."""
    monkeypatch.setattr(mosaic_gpu, "compiles", lambda: True)
    monkeypatch.setattr(by_token, "_on_platforms", lambda f, *arrays: f(Programs("gpu", as_mosaic_gpu()), *arrays))


def as_mosaic_gpu(**options):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    try:
        return plgpu.InterpretGPUParams(**options)
    except AttributeError:  # jax 0.10 has it, by another name
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        return InterpretGPUParams(**options)


IN_PIPELINE = [(f"linear_recurrence{kind}", length) for kind in ("", " complex") for length in (1, 63, 64, 65, 1000)]


@pytest.mark.parametrize("name, length", by_default([IN_PIPELINE[0], *IN_PIPELINE[3::5]], IN_PIPELINE))
def test_channels_in_a_pipeline_on_mosaic_gpu(name, length, on_mosaic_gpu):
    """More blocks than are on their way at once, more channels than a program has, both directions."""
    op, complex_ = CHANNELS[name]
    inputs, ids = channel_inputs(op, length, B=2, D=224, complex_=complex_)
    check(op, inputs, ids)
    check(partial(op, reverse=True), inputs, ids)
    assert "copy_gmem_to_smem" in str(everything(op, ids, "pallas").trace(inputs).jaxpr)


def test_rows_of_bfloat16_in_a_pipeline_on_mosaic_gpu(on_mosaic_gpu):
    """And a batch of batches."""
    inputs, _ = channel_inputs(ops.linear_recurrence, 37, D=128)
    narrow = {name: x if name == "initial_state" else x.astype(jnp.bfloat16) for name, x in inputs.items()}
    check(ops.linear_recurrence, narrow, None, "bfloat16 gradient")
    run = lambda impl: jax.jit(jax.vmap(everything(ops.linear_recurrence, None, impl)))
    batches = jax.tree.map(lambda x: x[:, None], inputs)
    assert_close(run("pallas")(batches), run("sequential")(batches), "float32 strong")


def test_splits_on_mosaic_gpu(on_mosaic_gpu):
    """Two pipelines in either direction: the first finds where the parts start."""
    inputs, ids = channel_inputs(ops.linear_recurrence, 512, B=1, D=104, complex_=True)
    with tried("in_pipeline", "gpu", programs=4):
        check(ops.linear_recurrence, inputs, ids)
        walks = str(everything(ops.linear_recurrence, ids, "pallas").trace(inputs).jaxpr).count(
            "unsafe_no_auto_barriers=True"
        )
    assert walks == 4


@pytest.mark.parametrize("name", ["linear_recurrence", "linear_recurrence complex"])
def test_pipelines_of_any_length_find_room(name):
    """Lowering is where Mosaic sees that a program asks for more shared memory than there is."""
    op, complex_ = CHANNELS[name]
    inputs, _ = channel_inputs(op, 512, D=128, complex_=complex_)
    with tried("in_pipeline", "gpu", steps=64), abstract_gpu():
        traced = everything(op, None, "pallas").trace(inputs)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("waits", [True, False])
def test_blocks_come_after_all_threads_have_read_on_mosaic_gpu(waits, monkeypatch, capfd):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("before jax 0.11 Mosaic's interpreter for GPUs finds no races")
    if not waits:
        monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    racing = Programs("gpu", as_mosaic_gpu(detect_races=True))
    monkeypatch.setattr(by_token, "_on_platforms", lambda f, *arrays: f(racing, *arrays))
    monkeypatch.setattr(mosaic_gpu, "compiles", lambda: True)
    inputs, ids = channel_inputs(ops.linear_recurrence, 100, B=1, D=104)
    jax.block_until_ready(everything(ops.linear_recurrence, ids, "pallas")(inputs))
    assert ("RACE DETECTED" in capfd.readouterr().out) != waits


@pytest.mark.parametrize("length", by_default([15, 150], [15, 33, 150]))
def test_lengths_of_strides(length):
    check(ops.linear_recurrence, *channel_inputs(ops.linear_recurrence, length))


def calls(inputs) -> set[str]:
    """The compilers of what is lowered for a GPU."""
    traced = everything(ops.linear_recurrence, None, "pallas").trace(inputs)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return {compiler for compiler in ("mosaic_gpu", "triton") if compiler in text}


GPUS = [("8.6", "triton"), ("9.0", "mosaic_gpu"), ("10.0", "mosaic_gpu"), ("12.0", "triton")]


@pytest.mark.parametrize("capability, compiler", by_default(GPUS[1::2], GPUS))
def test_which_compiler_a_gpu_has(capability, compiler, monkeypatch):
    """Workstations of the time of Blackwell have neither the instructions nor the shared memory."""
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    compiles = mosaic_gpu.compiles()
    monkeypatch.undo()
    monkeypatch.setattr(mosaic_gpu, "compiles", lambda: compiles)
    inputs, _ = channel_inputs(ops.linear_recurrence, 37, D=128, complex_=True)
    with abstract_gpu():
        assert calls(inputs) == {compiler}


def test_triton_has_what_mosaic_does_not_fit():
    """Programs that name no GPU, few channels, double precision."""
    inputs, _ = channel_inputs(ops.linear_recurrence, 37, D=128)
    few, _ = channel_inputs(ops.linear_recurrence, 37, D=40)
    with abstract_gpu():
        assert calls(inputs) == {"mosaic_gpu"} and calls(few) == {"triton"}
        with jax.enable_x64(True):
            assert calls(cast(inputs, np.float64)) == {"triton"}
    if jax.__version_info__ < (0, 11):  # which asks what GPU it is
        assert calls(inputs) == {"triton"}


def test_what_the_selective_scan_has_no_kernel_for():
    inputs, _ = channel_inputs(ops.selective_scan, 5)
    inputs |= {name: inputs[name][:, :, None].repeat(2, 2) for name in "BC"}
    with pytest.raises(
        NotImplementedError, match=r"impl='pallas' of selective_scan takes a real A, and B and C `B T N`"
    ):
        ops.selective_scan(**inputs, impl="pallas")
