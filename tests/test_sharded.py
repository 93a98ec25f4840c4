"""Time split over devices is time whole: the scan of any monoid, every op, every mixer, and a training run."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import (
    FULL_MIXERS,
    MIXERS,
    MONOIDS,
    OPS,
    WIDTH,
    assert_close,
    cast,
    initialised,
    normals,
    random_params,
    segments,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sampled import by_default

from jaxseq import GLA, S4D, Attention, Classifier, LanguageModel, Mamba, monoid, ops, scan
from jaxseq.mixers import DSS, S4, S5, MinGRU
from jaxseq.sharded import AXIS, sharded
from jaxseq.train import MeshConfig, TrainConfig, cross_entropy, device_mesh, fit

LENGTH = 48  # two tokens in half a run of eight devices, a window of the short convolutions in a whole one
IN_TIME = P(None, AXIS)
#: Few restarts, so that what passes between devices passes several of them, and one at the border of two.
FAR = jnp.asarray(np.stack([np.arange(LENGTH) >= 32, np.arange(LENGTH) >= 7])).astype(jnp.int32)


def split(function, devices, times, result):
    """The function with time split over so many devices: `times` and `result` are specs, as of `shard_map`."""
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=times, out_specs=result)


#: Monoid, devices, steps a device, reverse, float64.
SPLITS = [
    ("affine", 8, 1, False, False),
    ("affine complex", 2, 3, True, True),
    ("segmented matrix affine", 4, 2, False, True),
    ("log-sum-exp", 1, 2, True, False),
    ("segmented softmax", 4, 1, True, True),
    ("affine complex", 4, 2, False, False),
    ("segmented matrix affine", 8, 1, True, False),
    ("log-sum-exp", 8, 3, False, True),
    ("segmented softmax", 2, 3, False, False),
]


@pytest.mark.parametrize("name, devices, steps, reverse, wide", SPLITS)
def test_any_monoid(name, devices, steps, reverse, wide):
    member, rng = MONOIDS[name], np.random.default_rng(0)
    run = lambda form, e, s: form(member.monoid, e, s, reverse=reverse)
    apart = split(partial(run, sharded), devices, (IN_TIME, P()), (IN_TIME, P()))
    with jax.enable_x64(wide):
        drawn = jax.tree.map(jnp.asarray, (member.elements(rng, (2, devices * steps)), member.state(rng, (2,))))
        actual, expected = jax.jit(lambda e, s: (apart(e, s), run(scan.sequential, e, s)))(*drawn)
        finite = lambda tree: jax.tree.map(lambda x: jnp.where(x == -jnp.inf, -1e3, x), tree)
        assert_close(finite(actual), finite(expected), "float64" if wide else "float32 strong")


#: By default those that exchange states of different kinds; the selective scan is in Mamba, below.
EXCHANGED = ("linear_recurrence", "gla per channel", "dplr_recurrence", "softmax_attention", "nonlinear_recurrence")


@pytest.mark.parametrize(
    "name, devices",
    [
        pytest.param(name, (2, 8, 4)[i % 3], marks=[pytest.mark.slow] * (name not in EXCHANGED))
        for i, name in enumerate(OPS)
        if not OPS[name].whole
    ],
)
def test_every_op_in_value_and_gradient(name, devices):
    member = OPS[name]
    moving = member.moving or tuple(member.inputs(np.random.default_rng(0), 1, "mild"))
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        inputs = cast(member.inputs(rng, LENGTH, "mild"), jnp.float64)
        ids = FAR if member.segments else None
        call = lambda inputs, ids: member.call(inputs, ids, None)
        cotangents = cast(normals(rng, jax.eval_shape(call, inputs, ids)), jnp.float64)
        times = {name: IN_TIME if name in moving else P() for name in inputs}
        apart = split(call, devices, (times, IN_TIME), (IN_TIME, P() if member.moving else ()))

        def everything(form):
            values, pull = jax.vjp(lambda inputs: form(inputs, ids), inputs)
            return values, pull(jax.tree.map(lambda c, v: c.astype(v.dtype), cotangents, values))

        actual, expected = jax.jit(lambda: (everything(apart), everything(call)))()
        assert_close(actual, expected, "float64")


NARROW = ("linear_recurrence", "gla per channel", "selective_scan", "softmax_attention")


@pytest.mark.parametrize("name", by_default(["linear_recurrence", "softmax_attention"], NARROW))
def test_bfloat16_stays_what_it_is(name):
    """States travel between devices as float32: splitting adds no more rounding than that of inputs and outputs, and
    gradients are of the inputs' dtype."""
    member, rng = OPS[name], np.random.default_rng(0)
    inputs = cast(member.inputs(rng, LENGTH, "mild"), jnp.bfloat16)
    moving, ids = member.moving or tuple(inputs), FAR
    times = {name: IN_TIME if name in moving else P() for name in inputs}
    call = lambda inputs, ids: member.call(inputs, ids, None)
    apart = split(call, 4, (times, IN_TIME), (IN_TIME, P() if member.moving else ()))

    def slopes(form):
        """With the values that it takes them of."""

        def loss(inputs):
            values = form(inputs, ids)
            return jnp.sum(jnp.sin(values[0].astype(jnp.float32))), values

        return jax.value_and_grad(loss, has_aux=True)

    both = jax.jit(lambda inputs: [slopes(form)(inputs) for form in (apart, call)])
    ((_, (out, final)), split_slopes), ((_, expected), whole_slopes) = both(inputs)
    assert out.dtype == jnp.bfloat16 and all(x.dtype == jnp.float32 for x in jax.tree.leaves(final))
    assert_close(out, expected[0], "bfloat16")
    assert_close(final, expected[1], "bfloat16 exchanged")
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, split_slopes, inputs))
    assert_close(split_slopes, whole_slopes, "bfloat16 gradient")


@pytest.mark.parametrize(
    "name",
    by_default(
        ["Mamba"],
        [name.values[0] for name in FULL_MIXERS if not MIXERS[name.values[0]].whole],
    ),
)
def test_every_mixer_from_a_state(name):
    """Prefilled from a state where it has one of fixed size, called otherwise, with packed sequences."""
    member, rng = MIXERS[name], np.random.default_rng(0)
    module, params = initialised(member)
    x = jnp.asarray(rng.standard_normal((2, LENGTH, WIDTH)), jnp.float32)
    ids = FAR
    before = jnp.asarray(rng.standard_normal((2, 9, WIDTH)), jnp.float32)
    prefill = jax.jit(partial(module.apply, method="prefill"))
    state = prefill(params, before, None)[1] if member.recurrent else None

    def call(params, x, ids, state):
        if state is None:
            return module.apply(params, x, ids), ()
        return module.apply(params, x, state, ids, method="prefill")

    apart = split(call, 4, (P(), IN_TIME, IN_TIME, P()), (IN_TIME, P()))

    def everything(form):
        loss = lambda params, x: jnp.sum(jnp.sin(form(params, x, ids, state)[0]))
        return form(params, x, ids, state), jax.grad(loss, argnums=(0, 1))(params, x)

    actual, expected = jax.jit(lambda: (everything(apart), everything(call)))()
    assert_close(actual, expected, "mixer")


@pytest.mark.parametrize("name", [name for name, member in MIXERS.items() if member.whole])
def test_what_takes_whole_sequences_says_so(name):
    module = MIXERS[name].build()
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, LENGTH, WIDTH)))
    apart = split(module.apply, 4, (P(), IN_TIME), IN_TIME)
    with pytest.raises(NotImplementedError, match=f"time split over mesh axis {AXIS}; give every device whole"):
        jax.eval_shape(apart, params, jax.ShapeDtypeStruct((2, LENGTH, WIDTH), jnp.float32))


@pytest.mark.parametrize("kind", [S4, S4D, DSS, S5])
def test_both_directions_take_whole_sequences(kind):
    module = kind(WIDTH, 4, bidirectional=True)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, LENGTH, WIDTH)))
    apart = split(module.apply, 4, (P(), IN_TIME), IN_TIME)
    with pytest.raises(NotImplementedError, match="bidirectional=True.* cannot run with time split over mesh axis"):
        jax.eval_shape(apart, params, jax.ShapeDtypeStruct((2, LENGTH, WIDTH), jnp.float32))


def test_attention_to_keys_of_other_segments():
    """Keys may have ids of their own: here some that no query sees."""
    rng = np.random.default_rng(0)
    q, k, v = cast(normals(rng, [np.zeros((2, LENGTH, 2, 4))] * 3), jnp.float32)
    keys = jnp.where(jnp.asarray(rng.random((2, LENGTH)) < 0.3), -1, FAR)
    call = lambda q, k, v, ids, keys: ops.softmax_attention(q, k, v, segment_ids=ids, key_segment_ids=keys)
    apart = split(call, 4, (IN_TIME,) * 5, IN_TIME)
    assert_close(jax.jit(apart)(q, k, v, FAR, keys), jax.jit(call)(q, k, v, FAR, keys), "mixer")


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_classifier_pools_all_of_the_time(pool):
    model = Classifier(3, WIDTH, mixers=(partial(S4D, state_size=4),), pool=pool)
    rng = np.random.default_rng(0)
    x, lengths = jnp.asarray(rng.standard_normal((2, LENGTH, 5)), jnp.float32), jnp.asarray([20, LENGTH])
    params = random_params(model, x)
    for inputs, specs in (((x,), (IN_TIME,)), ((x, lengths), (IN_TIME, P()))):
        apart = split(lambda *args: model.apply(*args), 4, (P(), *specs), P())
        assert_close(jax.jit(apart)(params, *inputs), jax.jit(model.apply)(params, *inputs), "mixer")


@pytest.mark.parametrize("causal", [True, False])
def test_a_convolution_as_long_as_the_sequence(causal):
    x, kernel = cast(normals(np.random.default_rng(0), (np.zeros((2, 16, 4)), np.zeros((16, 4)))), jnp.float32)
    call = partial(ops.long_convolution, causal=causal)
    apart = jax.jit(split(call, 4, (IN_TIME, P()), IN_TIME))
    assert_close(apart(x, kernel), call(x, kernel), "float32 transform")


STACKS = {
    "gla": (partial(GLA, num_heads=2, conv_window=4, chunk_size=4),),
    "mamba": (Mamba,),
    "min gru": (MinGRU,),
    "attention": (partial(Attention, num_heads=2),),
    "one head": (partial(Attention, num_heads=1),),
    "hybrid": (partial(GLA, num_heads=2, chunk_size=4), partial(Attention, num_heads=2, window=4)),
}


def language_model(name, vocabulary=64, width=16):
    model = LanguageModel(vocabulary, width, mixers=STACKS[name], ngrams=(2, 3), ngram_buckets=64)

    def loss(params, batch, key):
        logits = model.apply(params, batch["inputs"], batch.get("segment_ids"))
        return cross_entropy(logits, batch["targets"])

    return loss, lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))


def text(length, rows=4, step=0):
    """Rows with a gap in the targets: devices do not count the same number of tokens."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 64, (rows, length + 1)).astype(np.int32)
    targets = np.where(np.arange(length) < length // 3, -100, tokens[:, 1:])
    return {"inputs": tokens[:, :-1], "targets": targets, "segment_ids": segments(rng, rows, length)}


@pytest.mark.parametrize(
    "name, mesh",
    [
        ("min gru", MeshConfig(fsdp=2, tensor=2, sequence=2)),
        pytest.param("hybrid", MeshConfig(data=2, sequence=4), marks=pytest.mark.slow),
    ],
)
def test_a_training_run_has_the_losses_of_one_device(name, mesh):
    loss, init = language_model(name)
    config = TrainConfig(steps=3, batch_size=4, learning_rate=1e-2, warmup_steps=1, log_every=1)

    def losses(mesh):
        rows = []
        report = lambda step, split, metrics: rows.append([metrics["loss"], metrics["accuracy"]])
        batches = lambda step: text(LENGTH, step=step)
        fit(loss, init, batches, config=config, mesh=device_mesh(mesh), report=report)
        return np.asarray(rows)

    assert np.allclose(losses(mesh), losses(MeshConfig()), atol=1e-4)


def communicated(compiled) -> int:
    """Bytes of the results of all collectives in a compiled program, a loop's body counted once."""
    sizes = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "c64": 8}
    kinds = r"= (.*?) (?:all-gather|collective-permute|all-reduce|reduce-scatter|all-to-all)(?:-start)?\("
    results = " ".join(re.findall(kinds, compiled.as_text()))
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", results)
    return sum(sizes[kind] * int(np.prod([int(n) for n in shape.split(",") if n])) for kind, shape in shapes)


FIXED = ["GLA conv grouped", "GatedDeltaNet", "Mamba", "S4D", "Attention window grouped"]


@pytest.mark.parametrize("name", by_default(["S4D", "Attention window grouped"], FIXED))
def test_mixers_of_fixed_state_communicate_states_alone(name):
    """The bytes of a layer, forward and backward, do not grow with the time that is split."""
    module, params = initialised(MIXERS[name])
    apart = split(lambda *args: module.apply(*args), 8, (P(), IN_TIME, IN_TIME), IN_TIME)
    gradient = jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(apart(*args))), argnums=(0, 1)))
    sizes = [(1, 64, WIDTH), (1, 256, WIDTH)]
    args = [(params, jnp.zeros(size), jnp.zeros(size[:2], jnp.int32)) for size in sizes]
    moved = [communicated(gradient.lower(*each).compile()) for each in args]
    assert 0 < moved[0] == moved[1]


def test_what_cannot_be_split_is_named():
    q = jnp.zeros((1, 8, 2, 4))
    attend = lambda q, **options: ops.softmax_attention(q, q, q, **options)
    convolve = lambda x: ops.short_convolution(x, jnp.zeros((4, 4)))[0]
    refused = {
        "leaves 1 tokens a device; attention": (attend, 8, q),
        "leaves 2 tokens a device, a window reaches 3 back; split time over at most 2": (convolve, 4, q[:, :, 0]),
        "x has 4 channels, which mesh axis sequence=8": (lambda x: ops.long_convolution(x, x[0]), 8, q[:, :, 0]),
    }
    for message, (call, devices, x) in refused.items():
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(split(call, devices, (IN_TIME,), IN_TIME), x)
    with pytest.raises(NotImplementedError, match="'sequential' is no form of .*; choose None, 'parallel', 'chunked'"):
        jax.eval_shape(split(partial(attend, impl="sequential"), 4, (IN_TIME,), IN_TIME), q)
    grid = lambda u: ops.grid_recurrence(u, u, u, u, u, u)[0]
    hidden = lambda q: ops.viterbi(q[0, 0, 0, :2], q[0, 0, :, :2], q[:, :, 0, :2])[0]
    for message, call in {"grid_recurrence": grid, "a hidden Markov model": hidden}.items():
        with pytest.raises(NotImplementedError, match=f"{message} cannot run with time split over mesh axis sequence"):
            jax.eval_shape(split(call, 4, (IN_TIME,), IN_TIME), q)
    module, params = initialised(MIXERS["Attention"])
    cached = lambda x: module.apply(params, x, module.init_state(1, max_length=4), method="prefill")[0]
    with pytest.raises(NotImplementedError, match="8 positions, key 12|4 positions, key 8"):
        jax.eval_shape(split(cached, 2, (IN_TIME,), IN_TIME), jnp.zeros((1, 8, WIDTH)))


def test_a_combine_that_returns_something_else_is_named():
    affine = monoid.affine
    elements, state = monoid.Affine(jnp.ones((1, 4, 2)), jnp.ones((1, 4, 2))), jnp.zeros((1, 2))
    narrow = affine._replace(combine=lambda e, f: jax.tree.map(lambda x: x.astype(jnp.bfloat16), affine.combine(e, f)))
    grown = affine._replace(act=lambda e, s: affine.act(e, s)[..., None])
    for form in (scan.sequential, scan.parallel, scan.chunked, scan.abreast, sharded):
        with pytest.raises(TypeError, match="combine returned bfloat16.* for float32.1, 2., float32.1, 2."):
            form(narrow, elements, state)
        with pytest.raises(TypeError, match="act returned float32.1, 2, 1. for float32.1, 2."):
            form(grown, elements, state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gla", "mamba", "one head", "hybrid"])
def test_a_long_sequence_has_the_losses_of_one_device(name, monkeypatch):
    """Five steps at T = 32,768, one document, weights so large that the losses tell what was read from far away.

    Time over eight devices; 5 minutes with full attention on one, else under one.
    """
    loss, small = language_model(name)
    init = lambda key: jax.tree.map(lambda x: 4 * x, small(key))
    config = TrainConfig(steps=5, batch_size=1, learning_rate=1e-2, warmup_steps=1, log_every=1)

    def losses(mesh):
        rows = []
        report = lambda step, split, metrics: rows.append(metrics["loss"])
        fit(loss, init, partial(_long, 2**15), config=config, mesh=device_mesh(mesh), report=report)
        return np.asarray(rows)

    expected = losses(MeshConfig())
    difference = lambda: np.abs(losses(MeshConfig(sequence=8)) - expected).max()
    apart = difference()
    print(f"{name}: the losses differ by {apart:.1e}")
    assert apart < 1e-4
    if name in ("gla", "mamba"):  # without the exchange they would be others
        nothing = lambda monoid, total, reverse: monoid.identity(total)
        monkeypatch.setattr("jaxseq.sharded._before", nothing)
        assert difference() > max(5e-5, 10 * apart)


def _long(length, step):
    batch = text(length, rows=1, step=step)
    return {name: batch[name] for name in ("inputs", "targets")}
