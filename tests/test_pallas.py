"""Kernels beside the definitions: on both kinds of accelerator as far as a CPU can tell, and proof that they ran.

What an op's family says of the form "pallas" stands in `test_ops.py`; here are chunks, columns and lengths of the size
in use, the GPU's way through time, races, and the compilers' front ends.
"""

import itertools
from contextlib import ExitStack, nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import OPS, abstract_gpu, assert_close, cast, segments
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from kernel_cases import (
    ATTENTION,
    CHANNELS,
    DISTINCT,
    MATRIX,
    TABLES,
    attention_inputs,
    channel_inputs,
    check,
    everything,
    matrix_inputs,
    shared,
)
from sampled import by_default

import pallas_kernels.by_token as by_token
import pallas_kernels.one_token as one_token
import pallas_kernels.over_pairs as over_pairs
from jaxseq import ops
from pallas_kernels.channel_programs import Programs
from pallas_kernels.over_time_on_gpu import walker_of_gpu
from pallas_kernels.over_time_on_tpu import on_tpu
from pallas_kernels.tiles import tile, tried
from pallas_kernels.walk import Walker
from pallas_kernels.within_chunk import _sums

KERNELS = [name for name, member in OPS.items() if "pallas" in member.forms and member.sweep]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The GPU's kernels, interpreted, with several parts of the columns."""
    walker = lambda table: walker_of_gpu(tile(table, "gpu", 32), interpret=True)
    monkeypatch.setattr("jaxseq.ops.chunkwise.on_platforms", lambda f, table, *of: f(walker(table), 32, *of[2:]))
    monkeypatch.setattr("jaxseq.ops.flash_attention.over_pairs", partial(over_pairs.on_gpu, interpret=True))
    with tried("over_pairs", "gpu", block=32), ExitStack() as stack:
        for table in {*TABLES.values()}:
            stack.enter_context(tried(table, "gpu", columns=16, programs=1, channels=16))
        yield


# A window leaves out blocks on both sides; without one "softmax_attention" is in tests/test_ops.py.
@pytest.mark.parametrize("name", by_default(["attention window", "attention both ways"], ATTENTION))
def test_attention_in_many_blocks(name):
    """Blocks that nothing is seen in are left out; segments; more keys than queries."""
    ids = jnp.asarray(segments(np.random.default_rng(0), 1, 300))
    check(partial(ops.softmax_attention, **ATTENTION[name]), attention_inputs(300, B=1), ids)
    if ATTENTION[name].get("causal", True):
        check(partial(ops.softmax_attention, **ATTENTION[name]), attention_inputs(70, past=200, B=1), None)


def test_a_tpu_fetches_only_blocks_that_are_met(monkeypatch):
    """Nine of sixteen pairs of blocks: in its order of programs the others change no block."""
    calls, call = [], over_pairs.pl.pallas_call
    monkeypatch.setattr(over_pairs.pl, "pallas_call", lambda *args, **of: calls.append(of) or call(*args, **of))
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), attention_inputs(512, B=1))
    jax.eval_shape(everything(partial(ops.softmax_attention, window=200), None, "pallas"), inputs)
    of_a_tpu = [of for of in calls if len(of["grid"]) == 4]
    assert len(of_a_tpu) == 3 * 2  # out, to queries and to keys; on a TPU, and interpreted
    for of in of_a_tpu:
        for at in (spec.index_map for spec in of["in_specs"][1].values()):
            places = [int(at(0, 0, np.int32(i), np.int32(j))[2]) for i in range(4) for j in range(4)]
            assert of["grid"][2:] == (4, 4) and sum(a != b for a, b in itertools.pairwise(places)) < 9


@pytest.mark.parametrize("name", by_default(["attention", "attention both ways"], ATTENTION))
def test_attention_on_a_gpu(name, on_a_gpu):
    ids = jnp.asarray(segments(np.random.default_rng(0), 2, 100))
    check(partial(ops.softmax_attention, **ATTENTION[name]), attention_inputs(100), ids)
    check(partial(ops.softmax_attention, **ATTENTION[name]), attention_inputs(100), None)


# The others are filled up below, each head with its own keys.
@pytest.mark.parametrize("name", by_default(["gla per head", "delta_rule per channel", "dplr_recurrence"], DISTINCT))
def test_matrix_states_on_a_gpu(name, on_a_gpu):
    """Of keys that heads share; those of each head are below."""
    op, decay = MATRIX[name]
    inputs, ids = matrix_inputs(op, 70, decay)
    check(op, shared(inputs), ids)


SPLIT = [(name, blocks, splits) for name in DISTINCT for blocks, splits in ((36, 4), (37, 1))]


@pytest.mark.parametrize(
    "name, blocks, splits", by_default([(f"gla per {what}", 36, 4) for what in ("value", "head")] + [SPLIT[-3]], SPLIT)
)
def test_matrix_states_in_splits_on_a_gpu(name, blocks, splits, on_a_gpu):
    """Long sequences in parts that are walked at once, forward and backward, and restart in some of them."""
    op, decay = MATRIX[name]
    inputs, ids = matrix_inputs(op, 32 * blocks, decay, B=1, H=1, K=16, V=16)
    with tried(TABLES[name], "gpu", programs=4):
        check(op, inputs, ids)
        of_splits = str(everything(op, ids, "pallas").trace(inputs).jaxpr).count(f"f32[{splits},1,16,16]")
    assert splits == 1 or of_splits > 0


FILLED_UP = [(name, 12, 20) for name in ("gla per channel", "gla per value", "gla per head", "delta_rule per head")]
FILLED_UP += [("gla per head", 20, 12), ("delta_rule per head", 8, 1), ("gla per value", 1, 8)]
PARTED = [("gla per channel", 20, 12), ("delta_rule per channel", 20, 12), ("dplr_recurrence", 40, 8)]


@pytest.mark.parametrize("name, K, V", by_default([*FILLED_UP[1:2], *FILLED_UP[3:5], *PARTED[::2]], FILLED_UP + PARTED))
def test_widths_that_are_no_power_of_two_on_a_gpu(name, K, V, on_a_gpu):
    op, decay = MATRIX[name]
    check(op, *matrix_inputs(op, 33, decay, B=1, K=K, V=V))


WIDTHS = [*((name, 12, 40) for name in DISTINCT), ("gla per value", 1, 3), ("delta_rule per head", 1, 3)]


def test_keys_that_heads_share():
    op, decay = MATRIX["gla per value"]
    inputs, ids = matrix_inputs(op, 20, decay, B=1, H=3, K=8, V=16)
    check(op, shared(inputs), ids)


@pytest.mark.parametrize("impl, platform", [("chunked", "cpu"), ("pallas", "tpu"), ("pallas", "cuda")])
def test_keys_that_heads_share_are_not_repeated(impl, platform):
    """In memory, over all of the time, with a decay a head: there are no rows of keys with their decays."""
    inputs, _ = matrix_inputs(ops.gated_linear_attention, 64, "B T H", H=6, K=32, V=16)
    run = lambda inputs: ops.gated_linear_attention(**inputs, impl=impl)

    def program(inputs):
        with abstract_gpu() if platform == "cuda" else nullcontext():
            return jax.jit(run).trace(inputs).lower(lowering_platforms=(platform,)).as_text()

    repeated = "tensor<2x64x6x32x"
    assert repeated in program(inputs)
    assert repeated not in program(shared(inputs))


# Of each kind of decay, and of each op, one.
@pytest.mark.parametrize(
    "name, K, V",
    by_default([(n, K, V) for n, K, V in WIDTHS if V == 3 or n in ("gla per channel", "dplr_recurrence")], WIDTHS),
)
def test_single_tokens(name, K, V, monkeypatch):
    """On both kinds of accelerator, the state in several parts, with gradients; one of the sequences restarts."""
    op, decay = MATRIX[name]
    inputs, ids = matrix_inputs(op, 1, decay, K=K, V=V, B=3)
    inputs["log_decay"] = inputs["log_decay"].at[0].set(-jnp.inf)
    check(op, inputs, ids)
    on_a_gpu = lambda token, *arrays: one_token._call(token, "gpu", True, *arrays)
    monkeypatch.setattr("jaxseq.ops.one_token.kernel", on_a_gpu)
    with tried("one_token", "gpu", columns=16):
        check(op, inputs, ids)


ONE = [("gla per head", 1, 8), ("delta_rule per channel", 8, 1)]


@pytest.mark.parametrize("name, K, V", by_default(ONE[:1], ONE))
def test_widths_of_one(name, K, V):
    """And in bfloat16 a TPU takes no product over one channel."""
    op, decay = MATRIX[name]
    inputs, ids = matrix_inputs(op, 20, decay, B=1, K=K, V=V)
    check(op, inputs, ids)
    narrow = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.ndim == 4 else x.dtype)
    traced = everything(op, ids, "pallas").trace(jax.tree.map(narrow, inputs))
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


OF_BLOCKS = ("gla per channel", "gla per head", "delta_rule per channel")
BLOCKS = [(name, length) for name in OF_BLOCKS for length in (1, 63, 64, 65, 1000)]


@pytest.mark.parametrize(
    "name, length",
    by_default(
        [("gla per channel", 65), ("gla per head", 65), *(("delta_rule per channel", n) for n in (1, 64))], BLOCKS
    ),
)
def test_lengths_of_chunks_in_use(name, length):
    op, decay = MATRIX[name]
    with tried(TABLES[name], "tpu", block=64):
        check(op, *matrix_inputs(op, length, decay, H=1, K=24, V=16))


def narrow(name, length):
    op, decay = MATRIX[name]
    inputs, ids = matrix_inputs(op, length, decay, H=1, strength="mild")
    wide = ("log_decay", "initial_state")
    return op, {k: x if k in wide else x.astype(jnp.bfloat16) for k, x in inputs.items()}, ids


@pytest.mark.parametrize("name", by_default(["gla per head"], ["gla per head", "delta_rule per channel"]))
def test_bfloat16_of_chunks_in_use(name):
    check(*narrow(name, 150), "bfloat16 gradient")


@pytest.mark.parametrize("name", by_default(["gla per channel", "gla per head", "delta_rule per head"], DISTINCT))
def test_bfloat16_of_chunks_on_a_gpu(name, on_a_gpu):
    """What is prepared and the states between chunks are kept in bfloat16."""
    check(*narrow(name, 100), "bfloat16 gradient")


# That the others are there is seen where they are lowered.
@pytest.mark.parametrize(
    "name", by_default(["linear_recurrence", "gla per channel", "selective_scan", "softmax_attention"], KERNELS)
)
def test_the_kernel_ran(name):
    """In both directions; and the forms that are no kernel have none."""
    member = OPS[name]
    inputs = cast(member.inputs(np.random.default_rng(0), 5, "mild"), np.float32)
    for impl in ("pallas", "chunked"):
        values = lambda inputs, impl=impl: member.call(inputs, None, impl)[0]
        backward = lambda inputs, run=values: jax.vjp(run, inputs)[1](jnp.ones_like(jax.eval_shape(run, inputs)))
        forward, both = str(jax.make_jaxpr(values)(inputs)), str(jax.make_jaxpr(backward)(inputs))
        assert ("pallas_call" in forward) == (impl == "pallas")
        assert (both.count("pallas_call") > forward.count("pallas_call")) == (impl == "pallas")


WALKS = ("gla per head", "delta_rule per channel", "linear_recurrence", "selective_scan")


# Of each way through time one.
@pytest.mark.parametrize("name", by_default(["gla per head", "selective_scan"], WALKS))
def test_no_race_and_no_block_out_of_bounds(name, monkeypatch):
    """Under the interpreter that keeps the memories of a TPU apart."""
    careful = pltpu.InterpretParams(detect_races=True)
    walker = Walker(partial(on_tpu, interpret=careful))
    monkeypatch.setattr("jaxseq.ops.chunkwise.on_platforms", lambda f, *of: f(walker, 16, *of[3:]))
    monkeypatch.setattr(by_token, "_on_platforms", lambda f, *arrays: f(Programs("tpu", careful), *arrays))
    if name in MATRIX:
        op, decay = MATRIX[name]
        check(op, *matrix_inputs(op, 33, decay, B=1, H=1, K=16, V=16))
    else:
        op, _ = CHANNELS[name]
        with tried("by_token", "tpu", strides=1):
            check(op, *channel_inputs(op, 33, B=1, D=8))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    assert not interpreter.races.races_found


TRANSFORMED = {"vmap": jax.vmap, "checkpoint": lambda f: jax.vmap(jax.checkpoint(f))}


@pytest.mark.parametrize("transformation", by_default(["checkpoint"], TRANSFORMED))
@pytest.mark.parametrize(
    "name", by_default(["delta_rule", "selective_scan", "attention"], ["delta_rule", *CHANNELS, "attention"])
)
def test_kernels_under_transformations(name, transformation):
    """Of the gradient too: each example by itself."""
    if name == "attention":
        op, inputs = ops.softmax_attention, attention_inputs(20, B=2)
    else:
        op, _ = (MATRIX | CHANNELS)[name]
        inputs, _ = (matrix_inputs if name in MATRIX else channel_inputs)(op, 20)
    shared = {k: inputs.pop(k) for k in ("A",) if k in inputs}

    def loss(inputs, impl):
        values = op(**jax.tree.map(lambda x: x[None], inputs), **shared, impl=impl)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(values))

    run = lambda impl: TRANSFORMED[transformation](jax.grad(partial(loss, impl=impl)))
    assert_close(jax.jit(run("pallas"))(inputs), jax.jit(run("sequential"))(inputs), "float32 strong")


SHAPES = {"odd": (2, 131, 2, 24, 48), "wide": (1, 64, 1, 256, 256)}


LOWERED = list(itertools.product((*DISTINCT, *CHANNELS, *ATTENTION), SHAPES))
WIDE = ("delta_rule per head", "dplr_recurrence", "linear_recurrence complex", "selective_scan", "attention both ways")


# Each kernel in one shape.
@pytest.mark.parametrize(
    "name, shape", by_default([(n, s) for n, s in LOWERED if (s == "wide") == (n in WIDE)], LOWERED)
)
def test_lowers_for_tpu_and_gpu(name, shape):
    (B, T, H, K, V), dtype = SHAPES[shape], jnp.bfloat16
    if name in MATRIX:
        op, decay = MATRIX[name]
        inputs, ids = matrix_inputs(op, T, decay, B=B, H=H, K=K, V=V)
        inputs = {k: x.astype(dtype) if k in ("query", "key", "value") else x for k, x in inputs.items()}
    elif name in CHANNELS:
        op, complex_ = CHANNELS[name]
        inputs, ids = channel_inputs(op, T, B=B, D=H * V, N=K // 2, complex_=complex_)
    else:
        op, inputs = partial(ops.softmax_attention, **ATTENTION[name]), attention_inputs(T, dtype, B, 2 * H, H, K, V)
        ids = jnp.zeros((B, T), jnp.int32)
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    with abstract_gpu():
        traced = everything(op, ids, "pallas").trace(inputs)
    for platform, call in (
        ("tpu", "tpu_custom_call"),
        ("cuda", "mosaic_gpu" if name.startswith("linear") and shape == "wide" else "triton"),
    ):
        assert call in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    "name, K, V",
    [("gla per channel", 24, 48), ("gla per value", 256, 256), ("delta_rule", 1, 1), ("dplr_recurrence", 24, 48)],
)
def test_single_tokens_lower_and_stay_in_place(name, K, V):
    """The state becomes the one after it."""
    op, decay = MATRIX[name]
    inputs, _ = matrix_inputs(op, 1, decay, H=3, K=K, V=V)
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    step = jax.jit(lambda S, inputs: op(**inputs, initial_state=S, impl="pallas")[::-1], donate_argnums=0)
    with abstract_gpu():
        traced = step.trace(inputs.pop("initial_state"), inputs)
    assert "input_output_aliases=((0, 0),)" in str(traced.jaxpr)
    for platform, call in (("tpu", "tpu_custom_call"), ("cuda", "triton")):
        (line,) = [line for line in traced.lower(lowering_platforms=(platform,)).as_text().splitlines() if call in line]
        assert "output_operand_alias<output_tuple_indices = [0], operand_index = 0" in line


def test_inside_shard_map():
    """Time is split over devices; where shard_map keeps track of axes, the message says what to do."""
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    inputs, _ = matrix_inputs(ops.delta_rule, 64, "B T H")
    inputs.pop("initial_state")

    def mapped(**options):
        spec = P("data", "sequence")
        run = lambda inputs: ops.delta_rule(**inputs, impl="pallas")[0]
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec,), out_specs=spec, **options))

    expected = jax.jit(lambda inputs: ops.delta_rule(**inputs, impl="sequential")[0])(inputs)
    assert_close(mapped(check_vma=False)(inputs), expected, "float32 strong")
    with pytest.raises(NotImplementedError, match=r"impl='pallas' inside jax.shard_map over .*check_vma=False"):
        mapped()(inputs)


def test_sums_lose_nothing():
    """Three products of bfloat16 are as close to the sums of float64 as float32 is, from tiny logs to huge ones."""
    rng = np.random.default_rng(0)
    g = -np.exp(rng.uniform(-18, 9, (128, 32))).astype(np.float32)
    which = np.tril(np.ones((128, 128), bool))
    found = jax.jit(partial(_sums, None, 3))(which, jnp.asarray(g))
    np.testing.assert_allclose(found, np.cumsum(g.astype(np.float64), axis=0), rtol=1e-6)
