"""Every form of every op against `sequential`: values, final states, all gradients; and what is refused, by name."""

import importlib
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CHUNK, OPS, assert_close, cast, log_decays, normals, segments
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sampled import by_default

from jaxseq import ops

LENGTH = 37  # odd, and four chunks and a bit
#: At every length and in every precision; some matrix states of many as slow tests.
SWEPT = [
    pytest.param(name, marks=[pytest.mark.slow] * (not member.sweep))
    for name, member in OPS.items()
    if member.sweep or name.startswith(("gla", "delta", "dplr_recurrence", "slot", "mesa"))
]


#: By default of every kind of state one: the others are built of the same parts, and equal `sequential` in float64.
KINDS = (
    "linear_recurrence", "gla per channel", "selective_scan", "log_linear_attention", "log_matmul", "softmax_attention",
)  # fmt: skip
NAMES = [param.values[0] for param in SWEPT]
ONE_OF_EACH = by_default(KINDS, NAMES)
#: Of those with kernels, and so with a choice of form; the others call the same transformations of JAX.
WITH_KERNELS = by_default(("linear_recurrence", "gla per channel", "selective_scan", "softmax_attention"), NAMES)


def fast(params):
    """Each with the forms to train with."""
    return [pytest.param(*p.values, form, marks=p.marks) for p in params for form in OPS[p.values[0]].fast]


def case(name, length=LENGTH, strength="mild", dtype=jnp.float64, segmented=True):
    """Inputs, cotangents and segment ids of one member, the same at every call."""
    member, rng = OPS[name], np.random.default_rng(0)
    inputs = cast(member.inputs(rng, length, strength), dtype)
    ids = jnp.asarray(segments(rng, 2, length)) if segmented and member.segments else None
    shapes = jax.eval_shape(lambda inputs: member.call(inputs, ids, "sequential"), inputs)
    return inputs, cast(normals(rng, shapes), jnp.float64), ids


def run(name, impl):
    """A jitted function: inputs, cotangents, segment ids → values, final state and every gradient."""

    def everything(inputs, cotangents, ids):
        values, pull = jax.vjp(lambda inputs: OPS[name].call(inputs, ids, impl), inputs)
        return {"value": values, "gradient": pull(jax.tree.map(lambda c, v: c.astype(v.dtype), cotangents, values))[0]}

    return jax.jit(everything)


@pytest.fixture(scope="module")
def truth():
    """`sequential` in float64, once for each case."""
    kept = {}

    def of(name, strength, dtype=jnp.float64):
        known = (name, strength, jnp.dtype(dtype).name)
        if known not in kept:
            with jax.enable_x64(True):
                inputs, cotangents, ids = case(name, strength=strength, dtype=dtype)
                if name not in kept:
                    kept[name] = run(name, "sequential")
                kept[known] = jax.device_get(kept[name](cast(inputs, jnp.float64), cotangents, ids))
        return kept[known]

    return of


def again(name, form):
    """A kernel whose values and gradients are met in float32, below or in tests/test_pallas.py; or one setting more of
    a form that runs with another, by way of the same monoid."""
    if form == "pallas":
        return OPS[name].sweep or name.startswith(("softmax_attention", "delta_rule", "linear_recurrence complex"))
    settings = ("gla", "delta_rule", "selective_scan", "softmax_attention", "log_")
    plain = ("gla per channel", "selective_scan", "softmax_attention", "softmax_attention decay", "log_matmul")
    return form in ("parallel", "in_rows") and name.startswith(settings) and name not in plain


@pytest.mark.parametrize(
    "name, impl",
    [
        pytest.param(name, form, marks=[pytest.mark.slow] * (member.slow or again(name, form)))
        for name, member in OPS.items()
        for form in member.forms
        if form != "sequential"
    ],
)
def test_forms_are_sequential_in_float64(name, impl, truth):
    with jax.enable_x64(True):
        form = run(name, impl)
        for strength in ("mild", "strong"):
            assert_close(form(*case(name, strength=strength)), truth(name, strength), "float64")


def single():
    """By default of every kind. Delta rules meet float32 in chunks of the size in use, below; most kernels in
    tests/test_pallas.py, state spaces in tests/test_against_state_spaces.py."""
    for p in fast(SWEPT):
        name, impl = p.values
        kernel = impl == "pallas" and name not in ("dplr_recurrence", "softmax_attention")
        kind = name in (*KINDS, "path_attention") or (name, impl) == ("dplr_recurrence", "pallas")
        yield pytest.param(name, impl, marks=[*p.marks] or [pytest.mark.slow] * (kernel or not kind))


@pytest.mark.parametrize("name, impl", list(single()))
def test_accuracy_in_float32(name, impl, truth):
    form = run(name, impl)
    for strength in ("mild", "strong"):
        inputs, cotangents, ids = case(name, strength=strength, dtype=jnp.float32)
        tolerance = OPS[name].float32 if strength == "mild" else "float32 strong"
        assert_close(form(inputs, cast(cotangents, jnp.float32), ids), truth(name, strength, jnp.float32), tolerance)


def rounded():
    """Of the kernels two by default; those of matrix states are in tests/test_pallas.py."""
    for p in fast(param for param in ONE_OF_EACH if "state_space" not in param.values[0]):
        name, impl = p.values
        kernel = impl == "pallas" and name not in ("linear_recurrence", "softmax_attention")
        yield pytest.param(name, impl, marks=[*p.marks] or [pytest.mark.slow] * kernel)


@pytest.mark.parametrize("name, impl", list(rounded()))
def test_accuracy_in_bfloat16(name, impl, truth):
    inputs, cotangents, ids = case(name, dtype=jnp.bfloat16)
    expected = truth(name, "mild", jnp.bfloat16)
    actual = run(name, impl)(inputs, cast(cotangents, jnp.float32), ids)
    out, final = actual["value"]
    assert out.dtype == jnp.bfloat16 and all(x.dtype == jnp.float32 for x in jax.tree.leaves(final))
    assert_close(actual["value"], expected["value"], "bfloat16")
    assert_close(actual["gradient"], expected["gradient"], "bfloat16 gradient")


def sampled(name, length):
    """The single token, which other forms take; a chunk and one more are one of two parts below, where there is a
    state."""
    single = ("linear_recurrence", "delta_rule per channel", "softmax_attention")
    return (length == CHUNK + 1 and name == "softmax_attention") or (length == 1 and name in single)


@pytest.mark.parametrize(
    "name, length",
    [
        pytest.param(*p.values, length, marks=[*p.marks] or [pytest.mark.slow] * (not sampled(*p.values, length)))
        for p in SWEPT
        for length in (1, CHUNK - 1, CHUNK, CHUNK + 1)
    ],
)
def test_lengths(name, length):
    with jax.enable_x64(True):
        sample = case(name, length)
        expected = run(name, "sequential")(*sample)
        for impl in OPS[name].fast[:1] + ((None,) if length == 1 else ()):
            assert_close(run(name, impl)(*sample), expected, "float64")


PARTS = ("linear_recurrence", "gla per channel", "selective_scan", "log_linear_attention")


@pytest.mark.parametrize("name", by_default(PARTS, [name for name in NAMES if OPS[name].moving]))
def test_two_parts_are_the_whole(name):
    """From any initial state, split after a chunk and a token, in a segment that goes on; gradients flow through the
    state."""
    with jax.enable_x64(True):
        inputs, (d_out, d_final), ids = case(name, 13)
        member, end = OPS[name], CHUNK + 1

        def two_parts(inputs):
            part = lambda at: inputs | {k: inputs[k][:, at] for k in member.moving if k in inputs}
            cut = lambda at: None if ids is None else ids[:, at]
            first, state = member.call(part(slice(0, end)), cut(slice(0, end)), None)
            # The state continues the segment of the first token, whatever its id.
            out, final = member.call(part(slice(end, None)) | {"initial_state": state}, cut(slice(end, None)), None)
            return jnp.concatenate([first, out], axis=1), final

        if ids is not None:
            ids = ids.at[:, end:].set(jnp.where(ids[:, end:] == ids[:, end : end + 1], ids[:, CHUNK:end], ids[:, end:]))
        weighted = lambda f: jax.jit(lambda i: (f(i), jax.vjp(f, i)[1]((d_out, d_final))))
        assert_close(weighted(two_parts)(inputs), weighted(lambda i: member.call(i, ids, None))(inputs), "float64")


@pytest.mark.parametrize("impl", OPS["gla per channel"].forms)
def test_a_decay_to_nothing_is_finite(impl):
    """log decay −∞ is a reset; decays of −20 throughout underflow to zero; neither makes a NaN."""
    inputs, cotangents, _ = case("gla per channel", 20, dtype=jnp.float32)
    form = run("gla per channel", impl)
    reset = inputs | {"log_decay": jnp.full_like(inputs["log_decay"], -0.1).at[:, 11].set(-jnp.inf)}
    restarted = jnp.asarray(np.arange(20) >= 11, jnp.int32)[None].repeat(2, 0)
    plain = inputs | {"log_decay": jnp.full_like(inputs["log_decay"], -0.1)}
    cotangents = cast(cotangents, jnp.float32)
    assert_close(form(reset, cotangents, None)["value"], form(plain, cotangents, restarted)["value"], "float32")
    for level in (-20.0, -1e4, -jnp.inf):
        gone = inputs | {"log_decay": jnp.full_like(inputs["log_decay"], level)}
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(form(gone, cotangents, None)))


def test_the_delta_rule_solves_for_any_keys():
    """Long keys up to β |k|² = 2, and one key over and over, where a series for the inverse would overflow."""
    q, k, v = normals(np.random.default_rng(0), [np.zeros((2, 131, 2, 16))] * 3)
    long = 10 * k / np.linalg.norm(k, axis=-1, keepdims=True)

    @partial(jax.jit, static_argnames="impl")
    def everything(inputs, impl):
        values, pull = jax.vjp(lambda inputs: ops.delta_rule(**inputs, chunk_size=64, impl=impl), inputs)
        return values, pull(jax.tree.map(jnp.ones_like, values))[0]

    for key, strength, tolerance in (
        (long, 0.02, "float32 strong"),
        (np.ones_like(k) / 4, 1.9, "float32 repeated keys"),
    ):
        inputs = dict(query=q, key=key, value=v, beta=np.full(k.shape[:3], strength))
        with jax.enable_x64(True):
            expected = everything(cast(inputs, jnp.float64), impl="sequential")
            assert_close(everything(cast(inputs, jnp.float64), impl="chunked"), expected, 1e-10)
        assert_close(everything(cast(inputs, jnp.float32), impl="chunked"), expected, tolerance)


@pytest.mark.parametrize("impl", ["sequential", "chunked"])
@pytest.mark.parametrize("name", ["gla bonus", "dplr_recurrence"])
def test_one_channel_may_forget_alone(name, impl):
    """A log decay of −∞ in one channel is the limit of low ones: no restart, and what is read before it stays."""
    inputs, _, _ = case(name, 9)
    at = lambda level: inputs | {"log_decay": jnp.asarray(inputs["log_decay"]).at[:, 4, :, 0].set(level)}
    with jax.enable_x64(True):
        call = jax.jit(lambda inputs: OPS[name].call(inputs, None, impl))
        assert_close(*(call(cast(at(level), jnp.float64)) for level in (-jnp.inf, -1e4)), "float64")


KEYS = ("norm 1", "norm 10", "repeated")


def matrix_inputs(op, level, keys, per_head=False, bonus=False, width=16, T=131):
    """Unit queries, keys of a norm, and log decays of one level or mixed, for ops in chunks of their own size."""
    rng = np.random.default_rng(0)
    q, k, v, a = normals(rng, [np.zeros((1, T, 2, width))] * 4)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    k = np.broadcast_to(unit(k[:, :1]), k.shape) + 0.01 * k if keys == "repeated" else unit(k)
    size = 10.0 if keys == "norm 10" else 1.0
    shape = k.shape[: 3 if per_head else 4]
    g = log_decays(rng, shape, "strong") if level == "mixed" else np.full(shape, float(level))
    inputs = dict(query=q, key=size * k, value=v, log_decay=g)
    if op is ops.delta_rule:
        inputs["beta"] = np.full(k.shape[:3], 1.9 / size**2)
    if op is ops.dplr_recurrence:
        inputs |= {"a": -unit(a), "b": unit(a) * 0.9}
    return inputs | ({"bonus": v[0, 0]} if bonus else {})


MATRIX_OPS = (ops.gated_linear_attention, ops.delta_rule, ops.dplr_recurrence)
LEVELS = (-20, 0, "mixed")
IN_USE = by_default(
    [  # every op, every level, and keys all but one another; long ones are solved for above
        (ops.gated_linear_attention, "norm 1", -20, {"bonus": True}),
        (ops.delta_rule, "repeated", "mixed", {}),
        (ops.dplr_recurrence, "repeated", "mixed", {}),
    ],
    [
        *((op, keys, level, {}) for op, keys, level in product(MATRIX_OPS, KEYS, LEVELS)),
        *((op, keys, "mixed", {"per_head": True}) for op, keys in zip(MATRIX_OPS, KEYS, strict=True)),
        *((ops.gated_linear_attention, "norm 1", level, {"bonus": True}) for level in (-20, "mixed")),
        *((op, "norm 1", "mixed", {"T": T}) for op in MATRIX_OPS for T in (31, 32, 33, 65)),
    ],
)


@pytest.mark.parametrize("op, keys, level, options", IN_USE)
def test_chunks_of_the_size_in_use(op, keys, level, options):
    """In float32 and bfloat16: values, states and gradients near those of the loop on the same inputs, at T = 131 and
    where a chunk is the whole sequence, of any length.

    The gradient of a log decay is bounded by ε times the largest of the others', not relative to itself: all but
    nothing is left of it where everything decays by e^-20.
    """
    exact = matrix_inputs(op, level, keys, **options)

    @partial(jax.jit, static_argnames="impl")
    def everything(inputs, cotangents, impl):
        values, pull = jax.vjp(lambda i: op(**i, impl=impl), inputs)
        return values, pull(jax.tree.map(lambda c, v: c.astype(v.dtype), cotangents, values))[0]

    for dtype, bound in ((jnp.float32, 1e-4 if keys == "repeated" else 1e-5), (jnp.bfloat16, 3e-2)):
        rounded = cast(exact, dtype) | cast({k: exact[k] for k in ("log_decay", "beta") if k in exact}, jnp.float32)
        shapes = jax.eval_shape(lambda i: op(**i), rounded)
        cotangents = cast(normals(np.random.default_rng(1), shapes), jnp.float32)
        values, gradients = everything(rounded, cotangents, impl="chunked")
        true, expected = everything(cast(rounded, jnp.float32), cotangents, impl="sequential")
        assert_close(values, true, bound)
        largest = max(np.abs(np.asarray(g, np.float64)).max() for n, g in expected.items() if n != "log_decay")
        apart = np.abs(np.asarray(gradients.pop("log_decay"), np.float64) - expected.pop("log_decay"))
        assert np.isfinite(apart).all() and apart.max() <= 10 * bound * largest
        assert_close(gradients, expected, bound)


@pytest.mark.parametrize("log_decay", ["per_head", "per_channel"])
@pytest.mark.parametrize("K, V", [(128, 64), (128, 256)])
def test_keys_of_all_heads_in_bfloat16(K, V, log_decay):
    """Fused on a CPU with what repeats them, these products were wrong (jax 0.10, 0.11)."""
    rng = np.random.default_rng(0)
    shapes = {"query": (1, 128, 1, K), "key": (1, 128, 1, K), "value": (1, 128, 4, V)}
    inputs = {name: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for name, shape in shapes.items()}
    g = -rng.uniform(0, 0.3, (1, 128, 4) if log_decay == "per_head" else (1, 128, 4, K)).astype(np.float32)
    run = lambda impl: jax.jit(lambda inputs: ops.gated_linear_attention(**inputs, log_decay=g, impl=impl))
    assert_close(run("chunked")(inputs), run("sequential")(cast(inputs, jnp.float32)), 2e-2)


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_vmap_and_numpy(name):
    """A leading axis is a batch; NumPy arrays are arrays."""
    inputs, _, ids = case(name, 5, dtype=jnp.float32)
    call = lambda inputs: OPS[name].call(inputs, ids, None)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), inputs)
    alone = jax.jit(call)
    expected = [alone(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(2)]
    assert_close(jax.jit(jax.vmap(call))(stacked), jax.tree.map(lambda *x: jnp.stack(x), *expected), "float32")
    assert_close(jax.jit(lambda: call(jax.device_get(inputs)))(), expected[0], "float32")


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_the_best_form_lowers_for_every_platform(name):
    inputs, _, ids = case(name, dtype=jnp.float32)
    loss = lambda inputs: sum(jnp.abs(x).sum() for x in jax.tree.leaves(OPS[name].call(inputs, ids, None)))
    traced = jax.jit(jax.grad(loss)).trace(inputs)
    for platform in ("cuda", "tpu", "cpu"):
        assert traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("name", SWEPT)
def test_a_form_that_does_not_exist_is_named_with_those_that_do(name):
    inputs, _, ids = case(name, 3, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="'triton'.*" + ".*".join(map(repr, OPS[name].forms))):
        jax.eval_shape(lambda inputs: OPS[name].call(inputs, ids, "triton"), inputs)


x, h = jnp.zeros((2, 5, 3)), jnp.zeros((2, 3))
q = jnp.zeros((2, 5, 4, 6))
ids = jnp.zeros((2, 5), jnp.int32)
A = jnp.zeros((3, 2), jnp.complex64)
gla, scan, attend = ops.gated_linear_attention, ops.selective_scan, ops.softmax_attention
path = partial(ops.path_attention, direction=q, beta=q[..., 0])
BAD = {
    "decay shape": (partial(ops.linear_recurrence, x[..., :2], x), ValueError, "decay of shape .2, 5, 2."),
    "recurrence state": (partial(ops.linear_recurrence, x, x, initial_state=h[:1]), ValueError, "initial_state"),
    "recurrence rank": (partial(ops.linear_recurrence, x, x[0, 0]), ValueError, "inputs has shape .3,."),
    "recurrence length": (partial(ops.linear_recurrence, x[:, :0], x[:, :0]), ValueError, "at least one step"),
    "recurrence chunks": (partial(ops.linear_recurrence, x, x, chunk_size=0), ValueError, "chunk_size=0"),
    "integers": (partial(ops.linear_recurrence, x, ids[..., None]), TypeError, "inputs has shape"),
    "no array": (partial(ops.linear_recurrence, x, "text"), TypeError, "inputs='text' is no array"),
    "segment ids": (partial(ops.linear_recurrence, x, x, segment_ids=ids[:, :4]), ValueError, "segment_ids has shape"),
    "key shape": (partial(gla, q, q[..., :3], q), ValueError, "key has shape .2, 5, 4, 3."),
    "log decay heads": (partial(gla, q, q, q, q[:, :, :3]), ValueError, "log_decay has 3 heads"),
    "gla heads": (partial(gla, q[:, :, :3], q[:, :, :3], q), ValueError, "key has 3 heads.*4 of value"),
    "gla axis": (partial(gla, q, q, q, decay_axis="time"), ValueError, "decay_axis='time'.*'key' or 'value'"),
    "gla channels": (partial(gla, q, q, q, q[..., :3]), ValueError, "log_decay has 3 channels.*'key' it takes 6"),
    "gla value bonus": (
        partial(gla, q, q, q, -q, decay_axis="value", bonus=q[0, 0]), ValueError, "bonus and decay_axis='value'",
    ),
    "positive decay": (partial(gla, q, q, q, q + 1), ValueError, "log_decay holds 1.0; gated_linear_attention takes"),
    "NaN decay": (partial(ops.delta_rule, q, q, q, q[..., 0], q[..., 0] + jnp.nan), ValueError, "log_decay holds nan"),
    "delta beta": (partial(ops.delta_rule, q, q, q, q[:, :3, :, 0]), ValueError, "beta has shape .2, 3, 4."),
    "delta heads": (partial(ops.delta_rule, q[:, :, :3], q[:, :, :3], q, q[..., 0]), ValueError, "key has 3 heads"),
    "dplr a": (partial(ops.dplr_recurrence, q, q, q, q[..., :3], q), ValueError, "a has shape .2, 5, 4, 3."),
    "dplr state rank": (
        partial(ops.dplr_state_space, x, A, jnp.zeros((3, 3, 2), A.dtype), A, A, jnp.ones(3)), ValueError, "rank 3",
    ),
    "log recurrence": (partial(ops.log_recurrence, None, x[:, :0]), ValueError, "at least one step"),
    "log semiring": (partial(ops.log_recurrence, None, x, semiring="min"), ValueError, "semiring='min'"),
    "gla state": (partial(gla, q, q, q, initial_state=q), ValueError, "initial_state has shape"),
    "gla length": (partial(gla, q[:, :0], q[:, :0], q[:, :0]), ValueError, "at least one step"),
    "chunk size": (partial(gla, q, q, q, chunk_size=0), ValueError, "chunk_size=0"),
    "matrices": (partial(ops.log_matmul, x), ValueError, "log_matrices has shape .2, 5, 3.*B T S S"),
    "no matrices": (partial(ops.log_matmul, x[:, :0, :, None] + x[:, :0, None]), ValueError, "at least one step"),
    "NaN": (partial(ops.log_matmul, q[..., :4].at[1, 2, 3, 0].set(jnp.nan)), ValueError, "NaN at .1, 2, 3, 0."),
    "semiring": (partial(ops.log_matmul, q[..., :4], semiring="min"), ValueError, "semiring='min'.*'max_plus'"),
    "vector": (partial(ops.log_matmul, q[..., :4], initial_state=h), ValueError, "initial_state has shape .2, 3."),
    "scan A": (partial(scan, x, x, jnp.zeros((4, 2)), x, x), ValueError, "A has shape"),
    "scan groups": (
        partial(scan, x, x, A.real, jnp.zeros((2, 5, 2, 2)), jnp.zeros((2, 5, 2, 2))), ValueError, "B has 2 groups",
    ),
    "scan chunk size": (partial(scan, x, x, A.real, x[..., :2], x[..., :2], chunk_size=0), ValueError, "chunk_size=0"),
    "state space": (partial(ops.diagonal_state_space, x, A, A[:2], A), ValueError, "B has shape"),
    "state space state": (
        partial(ops.diagonal_state_space, x, A, A, A, initial_state=jnp.zeros((2, 3, 2))), TypeError, "initial_state",
    ),
    "convolution segments": (
        partial(ops.diagonal_state_space, x, A, A, A, segment_ids=ids, impl="convolution"),
        NotImplementedError, "restart at segment_ids",
    ),
    "attention heads": (partial(attend, q, q[:, :, :3], q[:, :, :3]), ValueError, "key has 3 heads.*4 of query"),
    "attention lengths": (partial(attend, q, q[:, :3], q[:, :3]), ValueError, "query has 5 positions and key 3"),
    "attention decay": (
        partial(attend, q, q, q, log_decay=q[..., 0] + 1), ValueError, "log_decay holds 1.0; softmax_attention takes",
    ),
    "path decay": (partial(path, q, q, q, log_decay=q[..., 0] + 1), ValueError, "log_decay holds 1.0; path_attention"),
    "reflections": (partial(ops.reflected_keys, q[:, :3], q, q[..., 0]), ValueError, "direction has 5 steps and key 3"),
    "window": (partial(attend, q, q, q, window=0), ValueError, "window=0"),
    "attention segments": (
        partial(attend, q[:, :3], q, q, segment_ids=ids[:, :3]), ValueError, "key_segment_ids",
    ),
    "path heads": (
        partial(path, q, q[:, :, :3], q[:, :, :3], direction=q[:, :, :3], beta=q[:, :, :3, 0]),
        ValueError, "key has 3 heads.*4 of query",
    ),
    "path lengths": (partial(path, q, q[:, :3], q[:, :3]), ValueError, "query has 5 positions and key 3"),
    "path beta": (partial(path, q, q, q, beta=q[:, :3, :, 0]), ValueError, "beta has shape .2, 3, 4."),
    "path chunk size": (partial(path, q, q, q, chunk_size=0), ValueError, "chunk_size=0"),
    "short convolution": (partial(ops.short_convolution, x, jnp.zeros((4, 2))), ValueError, "weight has shape .4, 2."),
    "convolution state": (
        partial(ops.short_convolution, x, jnp.zeros((4, 3)), initial_state=x), ValueError, "initial_state has shape",
    ),
    "circular": (partial(ops.long_convolution, x, x[0, :3], causal=False), ValueError, "kernel has length 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_weights_that_all_devices_share_keep_their_gradient():
    """Inside `shard_map` over the batch: a decay and a bonus for each head, as RetNet and RWKV-6 have them."""
    q, k, v = cast(normals(np.random.default_rng(0), [jnp.zeros((8, 9, 2, 4))] * 3), jnp.float32)
    shared = {"decay": jnp.asarray([-0.1, -0.5]), "bonus": jnp.ones((2, 4))}

    def loss(shared, *tokens):
        o, _ = ops.gated_linear_attention(*tokens, shared["decay"], bonus=shared["bonus"])
        return jnp.sum(jnp.sin(o))

    split = jax.shard_map(
        lambda *args: jax.lax.psum(loss(*args), "data"),
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data"), P("data"), P("data")),
        out_specs=P(),
    )
    whole, apart = jax.jit(lambda *args: [jax.grad(f)(*args) for f in (loss, split)])(shared, q, k, v)
    assert_close(apart, whole, "mixer")


@pytest.mark.parametrize("semiring", ["log_sum_exp", "max_plus"])
def test_weights_of_zero_have_logs(semiring):
    """Steps where nothing was ever added are −∞, after them the sum; gradients are finite throughout."""
    inputs = jnp.asarray([-jnp.inf, -jnp.inf, 1.0, -jnp.inf, 2.0])[None, :, None]
    expected = [-np.inf, -np.inf, 1.0, 1.0, 2.0 + np.log1p(np.exp(-1.0)) if semiring == "log_sum_exp" else 2.0]
    for impl in ("sequential", "parallel", "chunked"):
        run = lambda x, impl=impl: ops.log_recurrence(None, x, semiring=semiring, impl=impl)[0]
        total = lambda x, run=run: (jnp.sum(jnp.where(jnp.isfinite(run(x)), run(x), 0)), run(x))
        gradient, h = jax.jit(jax.grad(total, has_aux=True))(inputs)
        np.testing.assert_allclose(h[0, :, 0], expected, rtol=1e-6)
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(gradient.sum(), 3, rtol=1e-6)


@pytest.mark.parametrize("name", by_default(["selective_scan groups"], [n for n in OPS if n.startswith("selective")]))
def test_chunks_of_the_selective_scan_as_accelerators_take_them(name, monkeypatch):
    """All states of a chunk at once, where a CPU loops."""
    module = importlib.import_module("jaxseq.ops.selective_scan")
    monkeypatch.setattr(module, "in_rows", partial(module.parallel, None))
    with jax.enable_x64(True):
        inputs = case(name)
        assert_close(run(name, "chunked")(*inputs), run(name, "sequential")(*inputs), "float64")


def test_a_batch_over_devices_stays_there():
    """The loop of a CPU reads no other device's sequences, forwards and backwards."""
    inputs, cotangents, _ = case("selective_scan groups", dtype=jnp.float32)
    double = lambda x: jnp.concatenate([x, x])
    batched = {name: double(x) if name not in ("A", "D") else x for name, x in inputs.items()}
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    whole = NamedSharding(mesh, P())
    laid = {name: jax.device_put(x, whole if name in ("A", "D") else rows) for name, x in batched.items()}
    given = jax.tree.map(lambda x: jax.device_put(double(x).astype(jnp.float32), rows), cotangents)
    text = run("selective_scan groups", "in_rows").lower(laid, given, None).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
