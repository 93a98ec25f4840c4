"""The two-dimensional recurrence: every form against the definition, the definition against loops and closed forms."""

import sys
from functools import partial
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, cast, normals, segments
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxseq import monoid, ops, scan

grid = ops.grid_recurrence
GENERAL = ("columns", "wavefront", "sweeps")


def case(shape, dtype=jnp.float64, none=(), coefficients=None, seed=0, scale=0.6):
    """Coefficients, inputs and an initial state, and cotangents of the states."""
    rng = np.random.default_rng(seed)
    column = (shape[0], *shape[2:])
    names = ("a1", "a2", "a3", "a4")
    inputs = {n: None if n in none else rng.uniform(-scale, scale, coefficients or shape) for n in names}
    inputs |= {"u1": rng.standard_normal(shape), "u2": rng.standard_normal(shape)}
    inputs["initial_state"] = rng.standard_normal(column), rng.standard_normal(column)
    return cast(inputs, dtype), cast(normals(rng, (inputs["u1"], inputs["u2"])), dtype)


def run(impls, **options):
    """A jitted function: inputs, cotangents → for each form, both states and every gradient."""

    def everything(inputs, cotangents):
        def one(impl):
            states, pull = jax.vjp(lambda inputs: grid(**inputs, **options, impl=impl), inputs)
            return states, pull(jax.tree.map(lambda c, h: c.astype(h.dtype), cotangents, states))[0]

        return [one(impl) for impl in impls]

    return jax.jit(everything)


def loop(a1, a2, a3, a4, u1, u2, initial_state, ids):
    """The definition in NumPy, with a restart of time where the id changes."""
    a1, a2, a3, a4 = (np.zeros_like(u1) if a is None else np.broadcast_to(a, u1.shape) for a in (a1, a2, a3, a4))
    h1, h2 = np.zeros(u1.shape), np.zeros(u1.shape)
    for b, t, v in np.ndindex(u1.shape[:3]):
        above = (h1[b, t - 1, v], h2[b, t - 1, v]) if t else (initial_state[0][b, v], initial_state[1][b, v])
        above = (0, 0) if t and ids[b, t] != ids[b, t - 1] else above
        left = (h1[b, t, v - 1], h2[b, t, v - 1]) if v else (0, 0)
        h1[b, t, v] = a1[b, t, v] * above[0] + a2[b, t, v] * above[1] + u1[b, t, v]
        h2[b, t, v] = a3[b, t, v] * left[0] + a4[b, t, v] * left[1] + u2[b, t, v]
    return h1, h2


@pytest.mark.parametrize("none", [(), ("a2",), ("a3",), ("a2", "a3")], ids=str)
def test_the_definition_is_a_loop(none):
    with jax.enable_x64(True):
        inputs, _ = case((2, 7, 4, 3), none=none, coefficients=(7, 1, 3))
        ids = segments(np.random.default_rng(1), 2, 7)
        expected = loop(**jax.device_get(inputs), ids=ids)
        for impl in ("sequential", None):
            assert_close(jax.jit(partial(grid, impl=impl))(**inputs, segment_ids=ids), expected, "float64")


@pytest.mark.parametrize("impl", [*GENERAL, "triangular"])
@settings(deadline=None, max_examples=3, derandomize=True)
@given(
    shape=st.sampled_from([(2, 9, 6, 3), (1, 5, 9, 2), (2, 7, 7, 1), (2, 1, 5, 2), (2, 6, 1, 3), (1, 1, 1, 1)]),
    none=st.sampled_from([("a2",), ("a3",), ("a2", "a3"), (), (), ()]),
    shared=st.booleans(),
    resets=st.booleans(),
    reverse=st.booleans(),
    reverse_variates=st.booleans(),
)
def test_forms_are_sequential_in_value_and_gradient(impl, shape, none, shared, resets, **directions):
    """The gradients of `sequential` are those of automatic differentiation."""
    none = none or (("a2",) if impl == "triangular" else ())
    with jax.enable_x64(True):
        inputs, cotangents = case(shape, none=none, coefficients=shape[3:] if shared else None)
        options = directions | ({"segment_ids": segments(np.random.default_rng(2), *shape[:2])} if resets else {})
        expected, actual = run(("sequential", impl), **options)(inputs, cotangents)
        assert_close(actual, expected, "float64")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_accuracy(dtype):
    inputs, cotangents = case((2, 23, 9, 3), dtype)
    impls = ("sequential", *GENERAL, None) if dtype == jnp.float32 else (None,)
    actual = run(impls)(inputs, cotangents)
    with jax.enable_x64(True):
        [(states, gradients)] = run(["sequential"])(*cast((inputs, cotangents), jnp.float64))
    for impl, (h, d) in zip(impls, actual, strict=True):
        assert all(x.dtype == dtype for x in (*h, *jax.tree.leaves(d))), impl
        assert_close(h, states, jnp.dtype(dtype).name)
        assert_close(d, gradients, "float32" if dtype == jnp.float32 else "bfloat16 gradient")


def test_second_derivatives():
    """The backward pass is differentiable itself."""
    with jax.enable_x64(True):
        inputs, _ = case((1, 4, 3, 2))
        loss = lambda inputs, impl: sum(jnp.sum(jnp.sin(h)) for h in grid(**inputs, impl=impl))
        steep = lambda inputs, impl: sum(jnp.sum(d**2) for d in jax.tree.leaves(jax.grad(loss)(inputs, impl)))
        expected, actual = jax.jit(lambda i: [jax.grad(steep)(i, impl) for impl in ("sequential", None)])(inputs)
        assert_close(actual, expected, "float64")


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reverse"])
def test_two_parts_are_the_whole(reverse):
    """In a segment that goes on, with the gradients that flow through the state."""
    with jax.enable_x64(True):
        inputs, cotangents = case((2, 9, 4, 2))
        ids = jnp.asarray(np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2], [0] * 7 + [1] * 2]))

        def two_parts(inputs):
            state, outputs = inputs["initial_state"], []
            for part in (slice(4, None), slice(0, 4)) if reverse else (slice(0, 4), slice(4, None)):
                own = {name: x[:, part] for name, x in inputs.items() if name != "initial_state"}
                h = grid(**own, initial_state=state, segment_ids=ids[:, part], reverse=reverse)
                state = tuple(x[:, 0 if reverse else -1] for x in h)
                outputs.append(h)
            return tuple(jnp.concatenate(x[::-1] if reverse else x, axis=1) for x in zip(*outputs, strict=True))

        whole = lambda inputs: grid(**inputs, segment_ids=ids, reverse=reverse)
        weighted = lambda f: jax.jit(lambda i: (f(i), jax.vjp(f, i)[1](cotangents)))(inputs)
        assert_close(weighted(two_parts), weighted(whole), "float64")


def test_segments_are_runs_of_their_own():
    with jax.enable_x64(True):
        inputs, _ = case((1, 9, 4, 2))
        ids = np.array([[3, 3, 3, 0, 5, 5, 5, 5, 3]])
        packed = jax.jit(grid)(**inputs, segment_ids=ids)
        for start, stop in ((0, 3), (3, 4), (4, 8), (8, 9)):
            own = {name: x[:, start:stop] for name, x in inputs.items() if name != "initial_state"}
            state = None if start else inputs["initial_state"]
            alone = jax.jit(partial(grid, impl="sequential"))(**own, initial_state=state)
            assert_close(tuple(h[:, start:stop] for h in packed), alone, "float64")


def test_reversal_is_a_flip():
    with jax.enable_x64(True):
        inputs, _ = case((2, 6, 5, 2))
        s1, s2 = inputs.pop("initial_state")
        sequential = jax.jit(partial(grid, impl="sequential"))
        flipped = lambda axes: {name: jnp.flip(x, axes) for name, x in inputs.items()}
        for axes in ((1,), (2,), (1, 2)):
            state = tuple(jnp.flip(s, 1) if 2 in axes else s for s in (s1, s2))
            h = sequential(**flipped(axes), initial_state=state)
            options = dict(reverse=1 in axes, reverse_variates=2 in axes)
            actual = jax.jit(partial(grid, **options))(**inputs, initial_state=(s1, s2))
            assert_close(actual, tuple(jnp.flip(x, axes) for x in h), "float64")


@pytest.mark.parametrize("shape", [(1, 9, 4, 2), (1, 4, 9, 2)])
def test_sweeps_converge_and_end(shape):
    """Geometrically, exactly after min(T, V + 1), and not one before; the residual says how far they are."""
    last, flips = min(shape[1], shape[2] + 1), dict(reverse=True, reverse_variates=True)

    @jax.jit
    def residuals(initial_state, **operands):
        common = dict(initial_state=initial_state, **flips)
        swept = [grid(**operands, **common, impl="sweeps", sweeps=k) for k in range(1, last + 1)]
        return jnp.stack([ops.coupling_residual(*h, *operands.values(), **common) for h in swept]), swept[-1]

    with jax.enable_x64(True):
        inputs, _ = case(shape)
        left, swept = residuals(**inputs)
        assert left[-1] < 1e-14 < 1e-7 < left[-2] and jnp.all(left[1:] < left[:-1]), left
        assert_close(swept, jax.jit(partial(grid, impl="sequential", **flips))(**inputs), "float64")


def test_the_impulse_response_in_closed_form():
    """1/[(1 − a1 z)(1 − a4 w) − a2 a3 z w] as a power series, times both numerators."""
    (a1, a2, a3, a4), (b1, b2), T, V = (0.7, -0.4, 0.3, 0.6), (1.0, 0.5), 8, 6
    K = np.zeros((T + 1, V + 1))  # one row and one column of zeros before the series
    for i, j in np.ndindex(T, V):
        K[i + 1, j + 1] = sum(
            (a2 * a3) ** m * comb(i, m) * a1 ** (i - m) * comb(j, m) * a4 ** (j - m) for m in range(min(i, j) + 1)
        )
    here, above, left = K[1:, 1:], K[:-1, 1:], K[1:, :-1]
    expected = b1 * (here - a4 * left) + b2 * a2 * above, b2 * (here - a1 * above) + b1 * a3 * left
    with jax.enable_x64(True):
        impulse = jnp.zeros((1, T, V, 1)).at[0, 0, 0, 0].set(1)
        h = grid(*(jnp.asarray(a) for a in (a1, a2, a3, a4)), b1 * impulse, b2 * impulse)
        assert_close(tuple(x[0, ..., 0] for x in h), expected, "float64")


def test_contractive_coefficients_are_stable_and_decays_alone_are_not():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        *z, u1, u2 = (jnp.asarray(rng.standard_normal((1, 200, 50, 4))) for _ in range(6))
        a1, a2, a3, a4 = ops.contractive(*(3 * x for x in z), rho=0.9)
        assert jnp.all(jnp.abs(a1) + jnp.abs(a2) < 1) and jnp.all(jnp.abs(a3) + jnp.abs(a4) < 1)
        assert_close((a1, a4), tuple(jnp.exp(-jax.nn.softplus(3 * x)) for x in (z[0], z[3])), "float64")
        largest = max(float(jnp.abs(h).max()) for h in jax.jit(grid)(a1, a2, a3, a4, u1, u2))
        slack = min(float((1 - a).min()) for a in (a1, a4)) * (1 - 0.9)
        assert largest <= min(1e3, max(float(jnp.abs(u).max()) for u in (u1, u2)) / slack)

        ones = jnp.ones((1, 48, 48, 1))
        corner = jax.jit(lambda *a: grid(*(jnp.asarray(x) for x in a), ones, ones)[0][0, -1, -1, 0])
        assert corner(0.9, 0.9, 0.9, 0.9) > 1e23
        assert 70 < corner(0.9, 0.1, 0.1, 0.9) < 80  # a2 a3 = (1 − a1)(1 − a4): linear growth
        np.testing.assert_allclose(corner(0.7, 0.5, 0.15, 0.5), 13.3, atol=0.05)
        with pytest.raises(ValueError, match="rho=1; contractive takes 0 <= rho < 1"):
            ops.contractive(*z, rho=1)


def blocks(e, f):
    """The product of two cells as 2×2 matrices with an offset."""
    (p1, p2, p3, p4, p5, p6), (q1, q2, q3, q4, q5, q6) = e, f
    linear = q1 * p1 + q2 * p3, q1 * p2 + q2 * p4, q3 * p1 + q4 * p3, q3 * p2 + q4 * p4
    return (*linear, q1 * p5 + q2 * p6 + q5, q3 * p5 + q4 * p6 + q6)


def elementwise(e, f):
    """The same offset, but the coefficients multiplied one by one."""
    return tuple(q * p for p, q in zip(e[:4], f[:4], strict=True)) + blocks(e, f)[4:]


def split(operator, e, f, g):
    """The largest difference between the two ways to bracket three elements."""
    pairs = zip(operator(operator(e, f), g), operator(e, operator(f, g)), strict=True)
    return max(abs(x - y) for x, y in pairs)


tuples = st.tuples(*[st.floats(0.1, 1)] * 6)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(e=tuples, f=tuples, g=tuples)
def test_the_elementwise_operator_is_not_associative(e, f, g):
    """With positive coefficients it fails for every three elements, and holds only without couplings."""
    assert split(blocks, e, f, g) < 1e-14
    assert split(elementwise, e, f, g) > 1e-4
    uncoupled = [(a1, 0, 0, a4, u1, u2) for a1, _, _, a4, u1, u2 in (e, f, g)]
    assert split(elementwise, *uncoupled) < 1e-14


def test_a_scan_of_blocks_over_both_axes_is_not_the_recurrence():
    """It follows one path to each cell, where the states are the sum over all."""
    with jax.enable_x64(True):
        inputs, _ = case((1, 6, 5, 2))
        a1, a2, a3, a4, u1, u2 = (inputs[name] for name in ("a1", "a2", "a3", "a4", "u1", "u2"))
        matrix = jnp.stack([jnp.stack([a1, a2], -1), jnp.stack([a3, a4], -1)], -2)
        elements = monoid.MatrixAffine(matrix, jnp.stack([u1, u2], -1))
        composed = lambda axis: jax.jit(partial(lax.associative_scan, monoid.matrix_affine.combine, axis=axis))
        over_time = composed(1)(elements)
        nested = composed(2)(over_time).inputs
        h1, h2 = jax.jit(grid)(a1, a2, a3, a4, u1, u2)
        assert jnp.abs(nested[..., 0] - h1).max() > 0.1 and jnp.abs(nested[..., 1] - h2).max() > 0.1
        # Along one axis alone it does what it should.
        along, _ = jax.jit(partial(scan.sequential, monoid.matrix_affine))(elements, jnp.zeros((1, 5, 2, 2)))
        assert_close(over_time.inputs, along, "float64")


def test_vmap_and_numpy():
    inputs, _ = case((2, 5, 4, 2), jnp.float32)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), inputs)
    one = jax.jit(lambda inputs: grid(**inputs))
    expected = [one(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(2)]
    for impl in (None, "sweeps"):
        actual = jax.jit(jax.vmap(lambda inputs, impl=impl: grid(**inputs, impl=impl)))(stacked)
        assert_close(actual, jax.tree.map(lambda *x: jnp.stack(x), *expected), "float32")
    assert_close(jax.jit(lambda: grid(**jax.device_get(inputs)))(), expected[0], "float32")


def test_the_best_form_lowers_for_every_platform():
    for shape, none in (((2, 9, 4, 2), ()), ((2, 1, 9, 2), ()), ((2, 9, 4, 2), ("a2",))):
        inputs, _ = case(shape, jnp.float32, none)
        traced = jax.jit(jax.grad(lambda i: sum(h.sum() for h in grid(**i)))).trace(inputs)
        for platform in ("cuda", "tpu", "cpu"):
            assert traced.lower(lowering_platforms=(platform,)).as_text()


def test_batches_on_their_own_devices():
    """Inside `shard_map`, with coefficients that all devices share."""
    inputs, cotangents = case((8, 5, 4, 2), jnp.float32, coefficients=(2,))
    inputs.pop("initial_state")
    specs = {name: P() if name.startswith("a") else P("data") for name in inputs}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def loss(inputs, cotangents, impl):
        return sum(jnp.sum(c * h) for c, h in zip(cotangents, grid(**inputs, impl=impl), strict=True))

    def apart(impl):
        total = lambda *args: lax.psum(loss(*args, impl), "data")
        return jax.shard_map(total, mesh=mesh, in_specs=(specs, P("data")), out_specs=P())

    everything = lambda *args: [jax.grad(f)(*args) for f in (partial(loss, impl=None), *map(apart, GENERAL))]
    expected, *others = jax.jit(everything)(inputs, cotangents)
    for actual in others:
        assert_close(actual, expected, "mixer")


ids = jnp.zeros((2, 4), jnp.int32)
x, a, column = jnp.zeros((2, 5, 4, 3)), jnp.full(3, 0.5), jnp.zeros((2, 4, 3))
call = partial(grid, a, a, a, a)
BAD = {
    "rank": (partial(call, x[0], x[0]), ValueError, "u1 has shape .5, 4, 3."),
    "shapes": (partial(call, x, x[:, :4]), ValueError, "u2 has shape .2, 4, 4, 3."),
    "coefficient": (partial(grid, a, a[:2], a, a, x, x), ValueError, "a2 of shape .2,. does not broadcast"),
    "coefficient larger": (partial(grid, a, a, x[None], a, x, x), ValueError, "a3 of shape .1, 2, 5, 4, 3."),
    "no decay": (partial(grid, None, a, a, a, x, x), TypeError, "a1=None is no array"),
    "no time": (partial(call, x[:, :0], x[:, :0]), ValueError, "u1 has shape .2, 0, 4, 3.*one or more"),
    "no variates": (partial(call, x[:, :, :0], x[:, :, :0]), ValueError, "u1 has shape .2, 5, 0, 3.*one or more"),
    "state": (partial(call, x, x, initial_state=(column, column[:1])), ValueError, "initial_state has .*1, 4, 3"),
    "state alone": (partial(call, x, x, initial_state=column), ValueError, "initial_state has shapes"),
    "segment ids": (partial(call, x, x, segment_ids=ids), ValueError, "segment_ids has shape .2, 4."),
    "no sweeps": (partial(call, x, x, sweeps=0, impl="sweeps"), ValueError, "sweeps=0 .*1 sweep or more"),
    "sweeps elsewhere": (partial(call, x, x, sweeps=2), ValueError, "sweeps=2 with impl=None"),
    "form": (partial(call, x, x, impl="pallas"), NotImplementedError, "'pallas'.*'columns', 'wavefront'"),
    "triangular": (
        partial(call, x, x, impl="triangular"), NotImplementedError, "a2=None or a3=None; .*'columns', .*'sweeps'",
    ),
    "NaN": (partial(call, x, x.at[1, 2, 3, 0].set(jnp.nan)), ValueError, "u2 is nan at .1, 2, 3, 0."),
    "infinite": (partial(grid, a, a, a, a.at[2].set(jnp.inf), x, x), ValueError, "a4 is inf at .2,."),
    "infinite state": (
        partial(call, x, x, initial_state=(column, column.at[0, 1, 2].set(-jnp.inf))),
        ValueError, "initial_state.1. is -inf at .0, 1, 2.",
    ),
    "residual": (partial(ops.coupling_residual, x, x, a, a, a, a[:2], x, x), ValueError, "a4 of shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    bad, error, message = BAD[name]
    with pytest.raises(error, match=message) as raised:
        bad()
    assert "\n" not in str(raised.value)


def test_a_grid_larger_than_memory_is_refused(monkeypatch):
    huge = jax.ShapeDtypeStruct((64, 10**6, 10**4, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"64\) take 1.22e\+06 GiB of the .* there are; feed .* initial_state"):
        jax.eval_shape(call, huge, huge)
    monkeypatch.setattr(sys.modules["jaxseq.ops.grid_recurrence"], "_memory", lambda: 8 * x.size * 4 - 1)
    with pytest.raises(ValueError, match="memory|GiB"):
        call(x, x)
    assert jnp.isfinite(jax.jit(call)(x[:, :4], x[:, :4])[0]).all()
