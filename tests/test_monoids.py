"""The laws every monoid keeps, and the forms that run any monoid over time, all in float64."""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import MONOIDS, PLAIN_MONOIDS, assert_close, normals
from hypothesis import given, settings
from hypothesis import strategies as st
from sampled import by_default

from jaxseq import monoid, scan
from jaxseq.segments import segment_starts

FORMS = {
    "parallel": scan.parallel,
    "chunked": partial(scan.chunked, chunk_size=4),
    "abreast": partial(scan.abreast, chunk_size=4),
}


def drawn(draw, *args):
    """In the precision that is on now; infinities stay what they are."""
    return jax.tree.map(jnp.asarray, draw(*args))


@cache
def sides(name):
    """Both sides of every law, (actual, expected)."""
    combine, identity, act = MONOIDS[name].monoid

    def laws(e, f, g, state):
        return {
            "associative": (combine(combine(e, f), g), combine(e, combine(f, g))),
            "neutral after": (combine(e, identity(e)), e),
            "neutral before": (combine(identity(e), e), e),
            "composition": (act(combine(e, f), state), act(f, act(e, state))),
            "at rest": (act(identity(e), state), state),
        }

    return jax.jit(laws)


@pytest.mark.parametrize("name", MONOIDS)
@settings(deadline=None, max_examples=12, derandomize=True)
@given(shape=st.sampled_from([(), (2, 3)]), seed=st.integers(0, 2**16))
def test_laws(name, shape, seed):
    member, rng = MONOIDS[name], np.random.default_rng(seed)
    with jax.enable_x64(True):
        drawn_elements = [drawn(member.elements, rng, shape) for _ in range(3)]
        for actual, expected in sides(name)(*drawn_elements, drawn(member.state, rng, shape)).values():
            assert_close(_comparable(name, actual), _comparable(name, expected), "float64")


def _comparable(name, element):
    """A softmax average as the average and the mass it stands for: its maximum may be −∞."""
    if "softmax" not in name:
        return element
    read = lambda s: (s.average(), s.normaliser * jnp.exp(jnp.where(jnp.isfinite(s.maximum), s.maximum, 0)))
    return (element.start, read(element.element)) if isinstance(element, monoid.Segmented) else read(element)


DIRECTED = product(["affine complex", "matrix affine", "segmented outer product", "segmented softmax"], [False, True])


@pytest.mark.parametrize("name, reverse", by_default([("matrix affine", False), ("segmented softmax", True)], DIRECTED))
def test_forms_are_sequential_in_value_and_gradient(name, reverse):
    member, rng = MONOIDS[name], np.random.default_rng(0)
    with jax.enable_x64(True):
        for length in (1, 11):
            elements, state = drawn(member.elements, rng, (2, length)), drawn(member.state, rng, (2,))
            differentiable, rest = _split(elements)
            cotangents = drawn(normals, rng, (_repeated(state, length), state))

            def everything(differentiable, state, cotangents, rest=rest):
                def value_and_gradients(form):
                    run = lambda tree, state: form(member.monoid, _join(tree, rest), state, reverse=reverse)
                    values, pull = jax.vjp(run, differentiable, state)
                    return values, pull(cotangents)

                return [value_and_gradients(form) for form in (scan.sequential, *FORMS.values())]

            expected, *others = jax.jit(everything)(differentiable, state, cotangents)
            for actual in others:
                assert_close(_finite(actual), _finite(expected), "float64")


def _repeated(state, length):
    return jax.tree.map(lambda s: jnp.repeat(s[:, None], length, axis=1), state)


def _split(elements):
    """The leaves a gradient exists for, and the rest."""
    leaves, structure = jax.tree.flatten(elements)
    real = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    return [x for x, r in zip(leaves, real, strict=True) if r], (leaves, structure, real)


def _join(differentiable, rest):
    leaves, structure, real = rest
    given_ = iter(differentiable)
    return jax.tree.unflatten(structure, [next(given_) if r else x for x, r in zip(leaves, real, strict=True)])


def _finite(tree):
    """Masked tokens carry −∞ as their largest logit: the same where both have it."""
    return jax.tree.map(lambda x: jnp.where(x == -jnp.inf, -1e3, x), tree)


@pytest.mark.parametrize("length", [1, 2, 11])
def test_segments_are_runs_of_their_own(length):
    member, rng = PLAIN_MONOIDS["affine"], np.random.default_rng(length)
    with jax.enable_x64(True):
        elements, state = drawn(member.elements, rng, (1, length)), drawn(member.state, rng, (1,))
        ids = np.cumsum(rng.random((1, length)) < 0.3, axis=1)
        starts = segment_starts(jnp.asarray(ids))
        whole = jax.jit(partial(scan.parallel, monoid.segmented(monoid.affine)))
        packed, _ = whole(monoid.Segmented(starts, elements), state)
        for segment in np.unique(ids):
            own = jax.tree.map(lambda x, own=ids[0] == segment: x[:, own], elements)
            before = state if segment == ids[0, 0] else jnp.zeros_like(state)
            alone, _ = scan.sequential(monoid.affine, own, before)
            assert_close(packed[:, ids[0] == segment], alone, "float64")


def test_hidden_markov_model_against_brute_force():
    states, length, rng = 3, 5, np.random.default_rng(0)
    log_transition, log_start = np.log(rng.dirichlet(np.ones(3), 3)), np.log(rng.dirichlet(np.ones(3)))
    log_likelihood = rng.standard_normal((length, states))
    paths = np.array(list(np.ndindex(*(states,) * length)))
    scores = log_start[paths[:, 0]] + log_likelihood[np.arange(length), paths].sum(1)
    scores += log_transition[paths[:, :-1], paths[:, 1:]].sum(1)
    with jax.enable_x64(True):
        elements = jnp.asarray(log_transition + log_likelihood[1:, None, :])[None]
        for matrices, best in ((monoid.log_sum_exp, np.log(np.exp(scores).sum())), (monoid.max_plus, scores.max())):
            total = lambda e, m=matrices: scan.parallel(m, e, jnp.asarray(log_start + log_likelihood[0])[None])[1]
            reduce = jax.nn.logsumexp if matrices is monoid.log_sum_exp else jnp.max
            value, marginals = jax.jit(jax.value_and_grad(lambda e, t=total, r=reduce: r(t(e))))(elements)
            assert_close(value, best, "float64")
            # The gradient is the posterior of every transition: of all paths, or of the best one.
            weights = np.exp(scores - best) if matrices is monoid.log_sum_exp else (scores == best).astype(float)
            expected = np.zeros_like(elements)
            for path, weight in zip(paths, weights, strict=True):
                expected[0, np.arange(length - 1), path[:-1], path[1:]] += weight
            assert_close(marginals, expected, "float64")


def test_the_softmax_monoid_is_softmax_attention():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((6, 4)) for _ in range(3))
    logits = np.where(np.tri(6, dtype=bool), 20 * q @ k.T, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    with jax.enable_x64(True):  # one query a batch entry, the keys are time
        elements = monoid.Softmax.from_token(jnp.asarray(logits), jnp.broadcast_to(jnp.asarray(v), (6, 6, 4)))
        empty = monoid.softmax.identity(jax.tree.map(lambda x: x[:, 0], elements))
        _, final = jax.jit(partial(scan.parallel, monoid.softmax))(elements, empty)
        assert_close(final.average(), weights / weights.sum(1, keepdims=True) @ v, "float64")
        assert not np.isnan(empty.average()).any()
