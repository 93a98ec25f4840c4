"""Newton over time: that it converges and how fast, that it falls back, what it keeps, and how it is split."""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sampled import by_default

from jaxseq.ops import nonlinear_recurrence

B, N = 2, 8


def tanh_rnn(W, h, x):
    return jnp.tanh(h @ W + x)


def gru(weights, h, x):
    r, z = (jax.nn.sigmoid(x @ weights[i] + h @ weights[i + 1]) for i in (0, 2))
    return z * h + (1 - z) * jnp.tanh(x + (r * h) @ weights[4])


def problem(length, gain=0.9, seed=0, cell=tanh_rnn, dtype=np.float32, N=N):
    rng = np.random.default_rng(seed)
    shape = (N, N) if cell is tanh_rnn else (5, N, N)
    W = gain * rng.standard_normal(shape) / np.sqrt(N)
    return tuple(jnp.asarray(x, dtype) for x in (W, rng.standard_normal((B, length, N)), rng.standard_normal((B, N))))


def everything(W, xs, start, cell=tanh_rnn, **options):
    """States and all gradients, and what the iterations did."""

    def loss(W, xs, start):
        states, final, done = nonlinear_recurrence(partial(cell, W), xs, start, report=True, **options)
        return jnp.sum(jnp.sin(states)) + jnp.sum(final), (states, done)

    gradients, (states, done) = jax.grad(loss, (0, 1, 2), has_aux=True)(W, xs, start)
    return states, gradients, done


def run(*arguments, **options):
    return jax.jit(partial(everything, **options))(*arguments)


OPTIONS = {
    "newton": {},
    "blocks": {"block_size": 100},
    "diagonal": {"jacobian": "diagonal"},
    "damped": {"damping": 0.3},
    "warm": {"guess": 1e-3},  # so far from the solution
}


@cache
def by_the_loop(cell):
    return run(*problem(1024, cell=cell), cell=cell)


@pytest.mark.parametrize(
    "name, cell",
    [("newton", gru), ("blocks", tanh_rnn), ("diagonal", gru), ("damped", tanh_rnn), ("warm", tanh_rnn)],
)
def test_parallel_is_sequential(name, cell):
    """1,024 tokens, without falling back."""
    arguments, options = problem(1024, cell=cell), dict(OPTIONS[name])
    states, gradients, none = by_the_loop(cell)
    if "guess" in options:
        options["guess"] = states + options["guess"] * jnp.cos(states)
    found, slopes, done = run(*arguments, cell=cell, impl="parallel", **options)
    assert done.converged.all() and not none.iterations.any()
    assert done.iterations.shape == (11 if name == "blocks" else 1,)
    assert done.iterations.max() <= {"newton": 10, "blocks": 10, "warm": 4}.get(name, 50)
    np.testing.assert_allclose(found, states, atol=1e-5)
    assert_close(slopes, gradients, 1e-4)


def test_chaos_falls_back():
    """Where neighbouring trajectories part, values are those of the loop to the bit, and the report says it."""
    arguments = problem(200, gain=4.0)
    states, _, _ = run(*arguments)
    found, slopes, done = run(*arguments, impl="parallel", max_iterations=20)
    assert not done.converged.any() and (done.iterations == 20).all() and (done.error > 1).all()
    np.testing.assert_array_equal(found, states)
    assert all(np.isfinite(x).all() for x in slopes)


@pytest.mark.parametrize("split", by_default([True], [False, True]))
def test_gradients_behind_chaos_are_the_loops(split):
    """Products of J over 900 tokens overflow, and a restart makes 0 · ∞ of them; also with time over devices."""
    xs = 0.01 + 1e-3 * jax.random.uniform(jax.random.key(0), (1, 1024, 1))
    ids = (jnp.arange(1024)[None] >= 900).astype(jnp.int32)
    weight = jnp.zeros((1, 1024, 1)).at[:, 900:905].set(1.0)

    cell, start = lambda h, x: 3.9 * h * (1 - h) + x, jnp.full((1, 1), 0.3)
    states = lambda xs, ids, impl: nonlinear_recurrence(cell, xs, start, segment_ids=ids, impl=impl)[0]
    solve = partial(states, impl="parallel")
    if split:
        mesh, time = jax.make_mesh((4,), ("sequence",), axis_types=(AxisType.Auto,)), P(None, "sequence")
        solve = jax.shard_map(solve, mesh=mesh, in_specs=(time, time), out_specs=time)
    slope = lambda f: jax.jit(jax.grad(lambda xs: jnp.sum(weight * f(xs, ids) ** 2)))(xs)
    assert_close(slope(solve), slope(partial(states, impl="sequential")), 1e-4)


@pytest.mark.parametrize("jacobian", by_default(["full"], ["full", "diagonal"]))
def test_chaos_over_few_tokens_falls_back(jacobian):
    """A step a token would end, in a trajectory that rounding has turned away from the loop's."""
    arguments = problem(64, gain=8.0)
    found, _, done = run(*arguments, impl="parallel", jacobian=jacobian)
    assert not done.converged.any() and (done.iterations == 49).all()
    np.testing.assert_array_equal(found, run(*arguments)[0])


@pytest.mark.parametrize("options", [{"jacobian": "diagonal"}, {"damping": 0.5}], ids=str)
@pytest.mark.parametrize("fast", by_default([True], [False, True]))
def test_many_small_steps_are_not_taken_for_an_end(fast, options):
    """A pair of units that sum what comes: every step is as small as the last; also beside one that is solved soon."""
    swap = jnp.asarray([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    tanh = jnp.asarray([0.0, 0.0, float(fast)])
    xs = jnp.asarray([[[1e-6, 1e-6, 0.0]]]) + tanh[None, None] * jnp.sin(jnp.arange(1024.0))[None, :, None]
    cell = lambda h, x: h @ swap + (1 - tanh)[None] * x + tanh[None] * jnp.tanh(h + x)
    states, _ = nonlinear_recurrence(cell, xs, jnp.zeros((1, 3)))
    found, _, done = nonlinear_recurrence(cell, xs, jnp.zeros((1, 3)), impl="parallel", report=True, **options)
    np.testing.assert_allclose(found, states, atol=1e-5)
    assert not done.converged.any()


@pytest.mark.parametrize("jacobian", by_default(["diagonal"], ["full", "diagonal"]))
def test_where_nothing_happens_the_guess_is_the_end(jacobian):
    solve = partial(nonlinear_recurrence, lambda h, x: jnp.tanh(h + x), jnp.zeros((1, 30, 2)), jnp.zeros((1, 2)))
    found, _, done = solve(impl="parallel", jacobian=jacobian, report=True)
    assert done.converged.all() and done.iterations.max() <= 2 and (found == 0).all()


def test_what_grows_behind_the_end_of_the_last_block():
    """The last token again and again, up to a whole block, would overflow: gradients are the loop's."""
    xs = jnp.full((1, 65, 1), 0.5).at[:, -1].set(10.0)
    total = lambda xs, **options: jnp.sum(
        nonlinear_recurrence(lambda h, x: jax.nn.relu(h * x) + 0.1, xs, jnp.zeros((1, 1)), **options)[0]
    )
    found = jax.jit(jax.grad(partial(total, impl="parallel", block_size=64)))(xs)
    assert_close(found, jax.grad(total)(xs), 1e-5)


def test_slow_convergence_is_not_taken_for_an_end():
    """Of a rotation the diagonal knows nothing: each step does little, and many small ones are still to come."""
    turn = 0.97 * jnp.asarray([[0.0, 1.0], [-1.0, 0.0]])
    xs, start = (jnp.asarray(np.random.default_rng(0).standard_normal(s), jnp.float32) for s in ((1, 1024, 2), (1, 2)))
    solve = partial(nonlinear_recurrence, lambda h, x: h @ turn + x, xs, start)
    states, _ = solve()
    found, _, done = jax.jit(partial(solve, impl="parallel", jacobian="diagonal", max_iterations=1024, report=True))()
    assert 100 < done.iterations[0] < 1024
    np.testing.assert_allclose(found, states, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(gain=st.floats(0, 4), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("options", [{}, {"jacobian": "diagonal", "block_size": 7}, {"damping": 0.5}], ids=str)
def test_never_a_wrong_answer(solvers, options, gain, seed):
    """Calm, chaotic or between: the loop's values, whether by Newton or, where it says so, by falling back."""
    with jax.enable_x64(True):
        arguments = problem(24, gain=gain, seed=seed, dtype=np.float64)
        found, done, states = jax.device_get(solvers(**options)(*arguments))
    np.testing.assert_allclose(found, states, atol=1e-8)
    if not done.converged[0]:  # fallen back: the loop's to the bit
        first = slice(options.get("block_size"))
        np.testing.assert_array_equal(found[:, first], states[:, first])


@pytest.fixture(scope="module")
def solvers():
    """Programs of both forms, compiled once for all examples."""

    @cache
    def of(**options):
        def both(W, xs, start):
            solve = partial(nonlinear_recurrence, partial(tanh_rnn, W), xs, start)
            found, _, done = solve(impl="parallel", max_iterations=12, report=True, **options)
            return found, done, solve()[0]

        return jax.jit(both)

    return of


@pytest.mark.parametrize("jacobian", ["full", "diagonal"])
def test_a_gradient_takes_no_iterations(jacobian):
    """It is one affine scan more, in reverse: the program has no other loop than the one that solves."""
    arguments = problem(50)
    count = lambda f: str(jax.make_jaxpr(f)(*arguments)).count(" while[")
    values = lambda *a: nonlinear_recurrence(partial(tanh_rnn, a[0]), *a[1:], impl="parallel", jacobian=jacobian)[0]
    assert count(values) == count(jax.grad(lambda *a: jnp.sum(values(*a)), (0, 1, 2))) == 1


def test_only_the_blocks_that_need_it_fall_back():
    W, xs, start = problem(300, gain=4.0)
    calm = xs.at[:, :100].set(10.0)  # saturated: nothing is left of the state before
    states, _, _ = run(W, calm, start)
    found, _, done = run(W, calm, start, impl="parallel", block_size=100, max_iterations=20)
    assert done.converged.tolist() == [True, False, False]
    np.testing.assert_allclose(found[:, :100], states[:, :100], atol=1e-5)


def test_what_overflows_on_the_way_is_met_again():
    """After n steps the first n states are exact, whatever overflows behind them."""
    grows = lambda h, x: jnp.cosh(2 * h) - 1 + x
    xs = jnp.full((1, 24, 1), 0.1)
    start, guess = jnp.zeros((1, 1)), jnp.zeros_like(xs).at[:, :12].set(80.0)
    found, _, done = nonlinear_recurrence(grows, xs, start, impl="parallel", guess=guess, report=True)
    assert done.converged.all()
    assert_close(found, nonlinear_recurrence(grows, xs, start)[0], "float32 strong")


def test_second_derivatives_and_forward_mode():
    with jax.enable_x64(True):
        W, xs, start = problem(20, dtype=np.float64)
        loss = lambda x, impl: jnp.sum(nonlinear_recurrence(partial(tanh_rnn, W), x, start, impl=impl)[0] ** 2)
        both = lambda of: [jax.jit(of(partial(loss, impl=impl)))(xs) for impl in ("parallel", "sequential")]
        tangent = lambda f: lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]
        assert_close(*both(tangent), 1e-10)
        assert_close(*both(lambda f: tangent(jax.grad(f))), 1e-10)


@pytest.mark.parametrize("jacobian", by_default(["diagonal"], ["full", "diagonal"]))
def test_under_vmap(jacobian):
    """Of weights as of sequences: each its own solution."""
    W, xs, start = problem(50)
    many = jnp.stack([W, 0.5 * W, -W])
    each = lambda W, impl, **options: nonlinear_recurrence(partial(tanh_rnn, W), xs, start, impl=impl, **options)[0]
    found = jax.jit(jax.vmap(partial(each, impl="parallel", jacobian=jacobian)))(many)
    assert_close(found, jnp.stack([each(W, "sequential") for W in many]), 2e-5)


SHAPES, WAYS = [(1, 4), (2, 1), (2, 2)], [{}, {"jacobian": "diagonal"}, {"max_iterations": 1}]
SPLIT = [((1, 4), {}), ((1, 4), {"max_iterations": 1}), ((2, 2), {"jacobian": "diagonal"})]


@pytest.mark.parametrize("shape, options", by_default(SPLIT, product(SHAPES, WAYS)), ids=str)
def test_split_over_devices(shape, options):
    """Time, the batch, or both; also where Newton falls back: then the devices run one after the other."""
    mesh = jax.make_mesh(shape, ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    arguments = problem(64)
    specs = (P(), P("data", "sequence"), P("data"))

    def values(W, xs, start):
        return nonlinear_recurrence(partial(tanh_rnn, W), xs, start, impl="parallel", **options)

    def both(f, *arguments):
        (states, final), pull = jax.vjp(f, *arguments)
        return states, final, pull((jnp.cos(states), jnp.sin(final)))

    split = jax.shard_map(values, mesh=mesh, in_specs=specs, out_specs=(specs[1], specs[2]))
    whole = lambda W, xs, start: nonlinear_recurrence(partial(tanh_rnn, W), xs, start)
    assert_close(jax.jit(partial(both, split))(*arguments), jax.jit(partial(both, whole))(*arguments), 2e-5)


def test_blocks_bound_the_memory():
    """Of value and gradient: J of one block, not of all of time."""

    def temporary(size):
        W, xs, start = problem(1024, N=24)
        lowered = jax.jit(partial(everything, impl="parallel", block_size=size)).lower(W, xs, start)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(32) < temporary(None) / 4


def test_wrong_arguments_are_named():
    W, xs, start = problem(5)
    call = partial(nonlinear_recurrence, partial(tanh_rnn, W), xs, start)
    for options, message in {
        ("jacobian", "block"): "jacobian='block'; choose 'full' or 'diagonal'",
        ("damping", 2.0): "damping=2.0",
        ("tolerance", 0.0): "tolerance=0.0 must be above 0",
        ("tolerance", float("nan")): "tolerance=nan must be above 0",
        ("max_iterations", 0): "max_iterations=0 must be at least 1",
        ("block_size", 0): "block_size=0 must be at least 1",
    }.items():
        with pytest.raises(ValueError, match=message):
            call(**dict([options]), impl="parallel")
    for options, message in (
        ({"guess": xs[:, 1:]}, r"guess has shape \(2, 4, 8\); it is \(2, 5, 8\)"),
        ({"guess": [xs]}, r"guess is PyTreeDef\(\[\*\]\), initial_state PyTreeDef\(\*\)"),
        ({"segment_ids": jnp.zeros((2, 4), jnp.int32)}, r"segment_ids has shape \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**options)
    with pytest.raises(ValueError, match=r"initial_state has shape \(1, 8\), .* it leads with \(2,\)"):
        nonlinear_recurrence(partial(tanh_rnn, W), xs, start[:1])
    with pytest.raises(ValueError, match="T = 0"):
        nonlinear_recurrence(partial(tanh_rnn, W), xs[:, :0], start)
    with pytest.raises(TypeError, match="initial_state is of int32; nonlinear_recurrence takes real"):
        nonlinear_recurrence(partial(tanh_rnn, W), xs, start.astype(jnp.int32))
    with pytest.raises(TypeError, match="cell returned .* for a state"):
        nonlinear_recurrence(lambda h, x: h[:, :2], xs, start)
    with pytest.raises(NotImplementedError, match="choose None, 'sequential', 'parallel'"):
        call(impl="chunked")
