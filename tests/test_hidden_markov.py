"""Hidden Markov inference against the enumeration of every path, in parts, at any length; and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close
from sampled import by_default

from jaxseq import ops

STATES, LENGTH = 3, 8
FORMS = ("sequential", "parallel", "chunked")  # None is one of them


def model(batch=1, length=LENGTH, moving=False, dtype=jnp.float64):
    """log_start, log_transition, log_emissions."""
    rng = np.random.default_rng(0)
    start, rows = rng.dirichlet(np.ones(STATES), batch), (batch, length, STATES) if moving else STATES
    arrays = np.log(start), np.log(rng.dirichlet(np.ones(STATES), rows)), rng.normal(-3, 2, (batch, length, STATES))
    return tuple(jnp.asarray(array, dtype) for array in arrays)


def enumerated(start, transition, emissions):
    """One sequence: log p(x), γ, ξ, the best path and its log-probability, from the sum over all paths."""
    length = len(emissions)
    transition = np.broadcast_to(transition, (length, STATES, STATES))
    paths = np.array(list(np.ndindex(*(STATES,) * length)))
    scores = start[paths[:, 0]] + emissions[np.arange(length), paths].sum(1)
    scores += transition[np.arange(length - 1), paths[:, :-1], paths[:, 1:]].sum(1)
    total = np.logaddexp.reduce(scores)
    posterior = np.exp(scores - total)
    states, transitions = np.zeros((length, STATES)), np.zeros((length - 1, STATES, STATES))
    for path, p in zip(paths, posterior, strict=True):
        states[np.arange(length), path] += p
        transitions[np.arange(length - 1), path[:-1], path[1:]] += p
    return ops.HiddenMarkovPosterior(total, states, transitions), paths[scores.argmax()], scores.max()


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("moving", [False, True], ids=["standing", "moving"])
def test_every_quantity_is_the_sum_over_all_paths(impl, moving):
    with jax.enable_x64(True):
        arrays = model(batch=2, moving=moving)
        everything = lambda *a: (ops.hidden_markov_smoother(*a, impl=impl), ops.viterbi(*a, impl=impl))
        posterior, (path, joint) = jax.jit(everything)(*arrays)
        for row, one in enumerate(zip(arrays[0], arrays[1] if moving else [arrays[1]] * 2, arrays[2], strict=True)):
            expected, best, best_joint = enumerated(*map(np.asarray, one))
            assert_close(jax.tree.map(lambda x, row=row: x[row], posterior), expected, 1e-12)
            assert np.array_equal(path[row], best)
            assert_close(joint[row], best_joint, 1e-12)


@pytest.mark.parametrize("impl", FORMS)
def test_the_gradient_of_the_likelihood_is_the_posterior(impl):
    with jax.enable_x64(True):
        arrays = model(batch=2, length=70)
        likelihood = lambda *a: ops.hidden_markov_log_likelihood(*a, impl=impl).sum()
        start, transition, emissions = jax.jit(jax.grad(likelihood, argnums=(0, 1, 2)))(*arrays)
        posterior = jax.jit(ops.hidden_markov_smoother)(*arrays)
        assert_close(start, posterior.states[:, 0], 1e-12)
        assert_close(transition, posterior.transitions.sum((0, 1)), 1e-12)
        assert_close(emissions, posterior.states, 1e-12)


def test_the_curvature_of_the_likelihood_is_the_covariance_of_the_states():
    """∂²log p(x) / ∂e_t[i] ∂e_t[j] = δ_ij γ_t[i] − γ_t[i] γ_t[j]: the shared backward pass has a gradient too."""
    with jax.enable_x64(True):
        start, transition, emissions = model()
        value = lambda e, impl: ops.hidden_markov_log_likelihood(start, transition, e, impl=impl).sum()
        for impl in ("parallel", "chunked"):
            gamma, curvature = jax.jit(lambda e, i=impl: (jax.grad(value)(e, i), jax.jacrev(jax.grad(value))(e, i)))(
                emissions
            )
            for t in range(LENGTH):
                expected = np.diag(gamma[0, t]) - np.outer(gamma[0, t], gamma[0, t])
                assert_close(curvature[0, t, :, 0, t], expected, 1e-10)


@pytest.mark.parametrize("impl", by_default(["chunked"], ["sequential", "chunked"]))
def test_a_shorter_sequence_is_the_sequence_cut(impl):
    """Whatever stands after its end; filter, smoother, likelihood, its gradient, and the path."""
    lengths = [LENGTH, 1, 5]

    def everything(start, transition, emissions, lengths=None):
        options = dict(lengths=lengths, impl=impl)
        filtered, evidence, following = ops.hidden_markov_filter(start, transition, emissions, **options)
        posterior = ops.hidden_markov_smoother(start, transition, emissions, **options)
        likelihood = lambda e: ops.hidden_markov_log_likelihood(start, transition, e, **options).sum()
        gradient = jax.grad(likelihood)(emissions)
        path, joint = ops.viterbi(start, transition, emissions, **options)
        in_time = (filtered, posterior.states, gradient, path, evidence)
        return in_time, (posterior.transitions, posterior.log_likelihood, following, joint, evidence.sum(1))

    with jax.enable_x64(True):
        start, transition, emissions = model(batch=3)
        together = jax.jit(everything)(start, transition, emissions, jnp.asarray(lengths))
        for row, length in enumerate(lengths):
            cut = start[row : row + 1], transition, emissions[row : row + 1, :length]
            in_time, (transitions, *others) = jax.jit(everything)(*cut)
            of_row = jax.tree.map(lambda x, row=row: x[row : row + 1], together)
            assert_close(tuple(x[:, :length] for x in of_row[0]), in_time, 1e-12)
            assert_close(of_row[1][0][:, : length - 1], transitions, 1e-12)
            assert_close(of_row[1][1:], tuple(others), 1e-12)
            assert all(not x[:, length:].any() for x in (of_row[0][1], of_row[0][2], of_row[0][4]))
            assert not of_row[1][0][:, length - 1 :].any()


@pytest.mark.parametrize("cut", [1, 5])
def test_two_parts_are_the_whole(cut):
    with jax.enable_x64(True):
        start, transition, emissions = model(batch=2)
        first = _filter(start, transition, emissions[:, :cut])
        second = _filter(first[2], transition, emissions[:, cut:])
        joined = [jnp.concatenate([a, b], axis=1) for a, b in zip(first[:2], second[:2], strict=True)]
        assert_close((*joined, second[2]), _filter(start, transition, emissions), 1e-12)


def test_bin_by_bin_is_the_whole():
    with jax.enable_x64(True):
        start, transition, emissions = model(batch=2)

        def step(start, emission):
            filtered, evidence, start = ops.hidden_markov_filter(start, transition, emission[:, None])
            return start, (filtered[:, 0], evidence[:, 0])

        final, (filtered, evidence) = jax.jit(lambda s, e: jax.lax.scan(step, s, e))(start, emissions.swapaxes(0, 1))
        whole = _filter(start, transition, emissions)
        posterior = jax.jit(ops.hidden_markov_smoother)(start, transition, emissions)
        assert_close((filtered.swapaxes(0, 1), evidence.swapaxes(0, 1), final), whole, 1e-12)
        assert_close(jnp.exp(whole[0][:, -1]), posterior.states[:, -1], 1e-12)


_filter = jax.jit(ops.hidden_markov_filter)


@pytest.mark.parametrize("impl", by_default(["chunked"], FORMS))
def test_states_that_cannot_be_are_no_nan(impl):
    """A left-to-right model, a bin that rules a state out, and a sequence that cannot be at all."""
    start = jnp.asarray([0.0, -jnp.inf, -jnp.inf])
    transition = jnp.log(jnp.asarray([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]))
    emissions = model(batch=2, dtype=jnp.float32)[2].at[0, 4, 2].set(-jnp.inf).at[1, 3].set(-jnp.inf)

    def everything(emissions):
        arrays = start, transition, emissions
        likelihood = lambda *a: jnp.sum(ops.hidden_markov_log_likelihood(*a, impl=impl)[0])
        second = lambda *a: jnp.sum(ops.hidden_markov_smoother(*a, impl=impl).states[0, :, 0])
        values = ops.hidden_markov_filter(*arrays, impl=impl), ops.hidden_markov_smoother(*arrays, impl=impl)
        return values, [jax.grad(f, argnums=(0, 1, 2))(*arrays) for f in (likelihood, second)]

    ((filtered, evidence, following), posterior), gradients = jax.jit(everything)(emissions)
    assert not any(np.isnan(x).any() for x in (filtered, evidence, following))
    assert all(np.isfinite(x).all() for x in (posterior.states, posterior.transitions, *jax.tree.leaves(gradients)))
    assert np.isfinite(evidence[0]).all() and (posterior.states[0, :5, 2] < 1e-6).all()
    assert evidence[1].sum() == posterior.log_likelihood[1] == -np.inf and not posterior.states[1].any()
    expected, _, _ = enumerated(*(np.asarray(x, np.float64) for x in (start, transition, emissions[0])))
    assert_close(jax.tree.map(lambda x: x[0], posterior), expected, 1e-5)


@pytest.mark.parametrize("impl", by_default(["sequential", "chunked"], FORMS))
def test_long_sequences_do_not_overflow(impl):
    """T = 10⁴ in float32, emissions of −1000 nats a bin, against the same in float64; digits go as log T does."""
    arrays = model(length=10_000, dtype=jnp.float32)
    posterior = jax.jit(partial(ops.hidden_markov_smoother, impl=impl))(*arrays[:2], arrays[2] - 1000)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        expected = jax.jit(ops.hidden_markov_smoother)(*wide)
        expected = expected._replace(log_likelihood=expected.log_likelihood - 1e7)
    assert_close(posterior, expected, 1e-3)


def test_packed_sequences_need_no_more_than_a_transition():
    """A transition whose rows are the start's forgets what came before: likelihoods of two sequences add."""
    with jax.enable_x64(True):
        start, transition, emissions = model(length=8)
        moving = jnp.broadcast_to(transition, (1, 8, STATES, STATES)).at[:, 3].set(start)
        value = jax.jit(ops.hidden_markov_log_likelihood)
        apart = [value(start, transition, e) for e in (emissions[:, :4], emissions[:, 4:])]
        assert_close(value(start, moving, emissions), sum(apart), 1e-12)


start, transition, emissions = (np.asarray(x) for x in model(batch=2, dtype=jnp.float32))
BAD = {
    "rows": ((start, transition + np.log(2), emissions), {}, r"log_transition at \[0\] sum to 2; every row"),
    "zero row": (
        (start, np.where(np.arange(3)[:, None] == 1, -np.inf, transition), emissions),
        {},
        r"at \[1\] sum to 0",
    ),
    "shared start": ((start[0] - 1, transition, emissions), {}, "the probabilities of log_start sum to 0.36"),
    "start": ((start - 1, transition, emissions), {}, r"log_start at \[0\] sum to 0.36"),
    "NaN": (
        (start, transition, np.where(emissions == emissions[1, 3, 2], np.nan, emissions)),
        {},
        r"NaN at.*\[1, 3, 2\]",
    ),
    "no bins": ((start, transition, emissions[:, :0]), {}, "at least one bin"),
    "states": ((start, transition[:2, :2], emissions), {}, "log_transition has shape .2, 2."),
    "empty": ((start, transition, emissions), {"lengths": jnp.asarray([8, 0])}, r"lengths\[1\]=0; .* 1 to 8"),
    "too long": ((start, transition, emissions), {"lengths": jnp.asarray([9, 1])}, r"lengths\[0\]=9; .* 1 to 8"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("op", [ops.hidden_markov_filter, ops.viterbi], ids=lambda op: op.__name__)
def test_bad_input_is_named(op, name):
    arrays, options, message = BAD[name]
    with pytest.raises(ValueError, match=message) as raised:
        partial(op, **options)(*arrays)
    assert "\n" not in str(raised.value)
