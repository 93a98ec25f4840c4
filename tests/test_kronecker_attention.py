"""Attention to pairs of keys: recorded values, the definition, the memory it takes, and what its polynomial misses."""

import math
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import load, recorded
from sampled import by_default

from jaxseq import ops
from jaxseq.mixers import KroneckerAttention
from jaxseq.ops.kronecker_attention import monomials
from jaxseq.tasks import match_sums
from jaxseq.tasks.matching import has_partners

PAIRS = {"full": dict(causal=False), "causal": {}, "causal_ordered": dict(ordered=True)}


def drawn(seed=0, batch=2, length=7, heads=2, width=3, bound=1.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    entries = rng.uniform(-bound, bound, (5, batch, length, heads, width))
    return tuple(jnp.asarray(x, dtype) for x in entries)


def plain(q, k1, k2, v1, v2, causal=True, ordered=False, ids=None):
    """All scores at once."""
    scores = jnp.einsum("bphk,bihk,bjhk->bphij", q, k1, k2) / q.shape[-1]
    p, i, j = np.meshgrid(*[np.arange(q.shape[1])] * 3, indexing="ij")
    seen = ((i <= p) & (j <= p) | (not causal)) & ((i <= j) | (not ordered))
    seen = np.broadcast_to(seen[None, :, None], scores.shape)
    if ids is not None:
        same = ids[:, :, None] == ids[:, None]
        seen = seen & (same[:, :, None, :, None] & same[:, :, None, None])
    scores = jnp.where(seen, scores, -jnp.inf)
    weights = jax.nn.softmax(scores.reshape(*scores.shape[:3], -1)).reshape(scores.shape)
    return jnp.einsum("bphij,bihv,bjhv->bphv", weights, v1, v2)


@recorded
@pytest.mark.parametrize("name", PAIRS)
def test_recorded(name):
    z = load("kronecker_attention")
    inputs = [jnp.asarray(z[n], jnp.float32)[None, :, None] for n in ("Q", "K1", "K2", "V1", "V2")]
    exact = jax.jit(partial(ops.kronecker_attention, block_size=5, **PAIRS[name]))(*inputs)
    near, _ = jax.jit(partial(ops.kronecker_polynomial, degree=4, **PAIRS[name]))(*inputs)
    np.testing.assert_allclose(exact[0, :, 0], z[name], atol=1e-6)
    np.testing.assert_allclose(near[0, :, 0], z[f"poly4_{name}"], atol=1e-6)


@recorded
def test_the_polynomial_misses_what_it_missed():
    """The recorded errors by degree, and numbers of monomials, in float64: rounding would hide those of degree 6."""
    z = load("kronecker_attention")
    with jax.enable_x64(True):
        inputs = [jnp.asarray(z[n])[None, :, None] for n in ("Q", "K1", "K2", "V1", "V2")]
        for degree, rank, *errors in z["poly_error_degree_rank_full_causal_ordered"]:
            assert len(monomials(4, int(degree))) == rank
            for name, error in zip(PAIRS, errors, strict=True):
                if degree % 2 == 0 and (name == "full" or degree == 2):  # odd degrees are refused
                    form = jax.jit(partial(ops.kronecker_polynomial, degree=int(degree), **PAIRS[name]))
                    assert np.abs(form(*inputs)[0][0, :, 0] - z[name]).max() == pytest.approx(error, rel=1e-3)


@recorded
def test_a_head_by_hand_finds_triples():
    """Its largest score is one exactly where two others complete a triple (the sheet's factors)."""
    z = load("kronecker_attention")
    scores = np.einsum("qd,id,jd->qij", z["match3_Q"], z["match3_K1"], z["match3_K2"])
    np.testing.assert_array_equal(np.isclose(scores.max((1, 2)), 1), z["match3_label"])


ONCE = [("full", False), ("causal", True), ("causal_ordered", True)]


@pytest.mark.parametrize("name, packed", by_default(ONCE, product(PAIRS, (False, True))))
def test_exact_is_the_definition_in_value_and_gradient(name, packed):
    """In blocks that do not divide the length, and keys of other segments unseen."""
    ids = jnp.asarray([[0, 0, 0, 1, 1, 1, 1], [5, 2, 2, 2, 2, 3, 3]]) if packed else None
    with jax.enable_x64(True):
        inputs = drawn(bound=3.0)
        value = lambda f: jax.jit(jax.value_and_grad(lambda inputs: jnp.sum(jnp.sin(f(*inputs)))))(inputs)
        blocked = partial(ops.kronecker_attention, block_size=3, segment_ids=ids, **PAIRS[name])
        assert_close(value(blocked), value(partial(plain, ids=ids, **PAIRS[name])), "float64")


def test_large_scores_and_few_keys_make_no_nan():
    inputs = drawn(bound=60.0, dtype=np.float32)
    total = lambda x: jnp.sum(ops.kronecker_attention(*x, ordered=True))
    value, gradient = jax.jit(jax.value_and_grad(total))(inputs)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradient)))
    unseen = EXACT(*inputs, segment_ids=jnp.zeros((2, 7), jnp.int32), key_segment_ids=jnp.full((2, 7), -1))
    np.testing.assert_array_equal(unseen, 0)


def test_memory_does_not_hold_the_scores():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(ops.kronecker_attention(*x))))
        return gradient.lower((x,) * 5).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(256) < 2 * temporaries(64) < 4 * 256**3 / 30


def test_monomials_are_those_of_the_degree():
    """Each once, in number (d + g over g)."""
    expected = {a for a in product(range(5), repeat=3) if sum(a) <= 4}
    found = [tuple(a) for a in monomials(3, 4).tolist()]
    assert set(found) == expected and len(found) == len(expected) == 35


@pytest.mark.parametrize("name", PAIRS)
def test_the_polynomial_is_near_where_entries_are_small_alone(name):
    """The sheet's table: at entries up to 1 the error falls fifty times from degree 2 to 4, at 3 it hardly falls."""
    with jax.enable_x64(True):
        forms = [jax.jit(partial(ops.kronecker_attention, **PAIRS[name]))]
        forms += [jax.jit(partial(ops.kronecker_polynomial, degree=n, **PAIRS[name])) for n in (2, 4)]
        entries = drawn(0, 5, 12, 1, 4)

        def errors(bound):
            exact, *near = (form(*(bound * x for x in entries[:3]), *entries[3:]) for form in forms)
            return [np.median(np.abs(o - exact).max(axis=(1, 2, 3))) for o, _ in near]

        two, four = errors(1.0)
        assert four < two / 50 and four < 1e-6
        two, four = errors(3.0)
        assert four > two / 5


EXACT = jax.jit(ops.kronecker_attention)
POLYNOMIALS = {
    degree: jax.jit(lambda *x, degree=degree: ops.kronecker_polynomial(*x, degree=degree)[0]) for degree in (0, 2, 4)
}


@settings(max_examples=40, deadline=None)
@given(
    bound=st.floats(0.1, 2.5),
    width=st.sampled_from((1, 3)),
    degree=st.sampled_from((0, 2, 4)),
    corners=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_polynomial_errs_within_its_bound(bound, width, degree, corners, seed):
    """Of any entries up to `bound`, and of those all at it, whose scores are as large as they can be."""
    with jax.enable_x64(True):
        inputs = drawn(seed, 1, 6, 1, width)
        inputs = map(jnp.sign, inputs) if corners else inputs
        q, k1, k2, v1, v2 = (scale * x for scale, x in zip((bound,) * 3 + (1, 1), inputs, strict=True))
        error = np.abs(POLYNOMIALS[degree](q, k1, k2, v1, v2) - EXACT(q, k1, k2, v1, v2)).max()
    assert error <= ops.kronecker_polynomial_error(bound**3, degree) + 1e-12


def test_the_bound_is_its_formula_and_falls_with_the_degree():
    assert ops.kronecker_polynomial_error(1.5, 4) == pytest.approx(2 * math.exp(1.5) * 1.5**5 / math.factorial(5))
    assert ops.kronecker_polynomial_error(0, 2) == 0 and math.isfinite(ops.kronecker_polynomial_error(1e4, 2))
    bounds = [ops.kronecker_polynomial_error(1.0, degree) for degree in range(0, 20, 2)]
    assert bounds == sorted(bounds, reverse=True) and bounds[-1] < 1e-15 < 1 < bounds[0]


def test_a_bound_that_holds_changes_nothing():
    """Also where its dtype rounds it, and where nothing is known of the entries."""
    inputs = tuple(jnp.full((1, 2, 1, 3), 0.1, jnp.float32) for _ in range(5))
    o, final = ops.kronecker_polynomial(*inputs)
    assert_close(ops.kronecker_polynomial(*inputs, bound=0.1), (o, final), 0.0)
    assert_close(jax.jit(partial(ops.kronecker_polynomial, bound=0.01))(*inputs), (o, final), "float32")


def test_exact_attention_alone_has_a_longest_sequence():
    x = jax.ShapeDtypeStruct((1, 9, 8), jnp.float32)
    for fields in ({"degree": 2, "max_length": 8}, {"max_length": None}, {"max_length": 9}):
        y, _ = jax.eval_shape(KroneckerAttention(8, **fields).init_with_output, jax.random.key(0), x)
        assert y.shape == x.shape


def test_the_polynomial_over_parts_and_segments():
    with jax.enable_x64(True):
        inputs = drawn()
        for ordered in (False, True):
            run = jax.jit(partial(ops.kronecker_polynomial, ordered=ordered))
            whole, final = run(*inputs)
            first, state = run(*(x[:, :3] for x in inputs))
            rest, last = run(*(x[:, 3:] for x in inputs), initial_state=state)
            assert_close((jnp.concatenate([first, rest], axis=1), last), (whole, final), "float64")
            ids = jnp.asarray([[0, 0, 0, 1, 1, 1, 1]] * 2)
            alone = run(*(x[:, 3:] for x in inputs))
            packed, kept = run(*inputs, segment_ids=ids)
            assert_close((packed[:, 3:], kept), alone, "float64")


def test_where_all_is_seen_order_does_not_matter():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 8)), jnp.float32)
    for fields in ({}, {"degree": 2}):
        module = KroneckerAttention(8, num_heads=2, causal=False, **fields)
        params, apply = random_params(module, x), jax.jit(module.apply)
        order = np.random.default_rng(1).permutation(9)
        np.testing.assert_allclose(apply(params, x[:, order]), apply(params, x)[:, order], atol=1e-6)
        with pytest.raises(NotImplementedError, match=r"KroneckerAttention\(causal=False\) looks ahead"):
            module.init_state(1, max_length=4)


@pytest.mark.parametrize("order", [2, 3])
def test_partners_against_brute_force(order):
    x, y = match_sums(jax.random.key(0), num_examples=8, length=7, modulus=29, order=order)
    for row, labels in zip(np.asarray(x), np.asarray(y), strict=True):
        rest = [sum(some) for some in product(row, repeat=order - 1)]
        np.testing.assert_array_equal(labels, [any((a + b) % 29 == 0 for b in rest) for a in row])


@recorded
def test_partners_are_the_recorded_ones():
    z = load("kronecker_attention")
    np.testing.assert_array_equal(has_partners(jnp.asarray(z["match3_x"]), int(z["match3_M"]), 3), z["match3_label"])


BAD = {
    "ordered=True with causal=False": lambda x: ops.kronecker_attention(*x, causal=False, ordered=True),
    "block_size=0; kronecker_attention takes 1": lambda x: ops.kronecker_attention(*x, block_size=0),
    "query has 7 positions and key_1 3": lambda x: ops.kronecker_attention(x[0], *(a[:, :3] for a in x[1:])),
    "degree=3; kronecker_polynomial takes an even": lambda x: ops.kronecker_polynomial(*x, degree=3),
    "degree=1; kronecker_polynomial_error takes an even": lambda x: ops.kronecker_polynomial_error(1.0, 1),
    "largest_score=-1.0; kronecker_polynomial_error": lambda x: ops.kronecker_polynomial_error(-1.0, 2),
    "segment_ids with causal=False": lambda x: ops.kronecker_polynomial(
        *x, causal=False, segment_ids=jnp.zeros((2, 7), jnp.int32)
    ),
    "degree=3; KroneckerAttention takes an even": lambda x: KroneckerAttention(8, degree=3).init_state(1),
    "bound=0; KroneckerAttention takes": lambda x: KroneckerAttention(8, bound=0).init_state(1, max_length=1),
    "max_length=None; KroneckerAttention takes": lambda x: KroneckerAttention(8).init_state(1),
    "ordered=True with causal=False; Kronecker": lambda x: KroneckerAttention(8, ordered=True, causal=False).init(
        jax.random.key(0), jnp.zeros((1, 3, 8))
    ),
    "max_length=0; KroneckerAttention takes 1": lambda x: KroneckerAttention(8, max_length=0).init_state(1),
    r"x has 7 tokens; KroneckerAttention\(max_length=6\) is exact": lambda x: KroneckerAttention(8, max_length=6).init(
        jax.random.key(0), jnp.zeros((1, 7, 8))
    ),
    r"max_length=7; the cache of KroneckerAttention\(max_length=6\)": lambda x: KroneckerAttention(
        8, max_length=6
    ).init_state(1, max_length=7),
    "degree=6 of heads of 32 channels has 2,760,681 monomials": lambda x: KroneckerAttention(32, 1, 6).init_state(1),
    "degree=46 of heads of 3 channels has 18,424": lambda x: ops.kronecker_polynomial(*x, degree=46),
    "bound=0; kronecker_polynomial takes": lambda x: ops.kronecker_polynomial(*x, bound=0),
    r"key_2 holds -?1\.\d+; kronecker_polynomial\(bound=1.0\)": lambda x: ops.kronecker_polynomial(
        *x[:2], 1.5 * x[2], *x[3:], bound=1.0
    ),
    "query holds nan; kronecker_polynomial": lambda x: ops.kronecker_polynomial(jnp.nan * x[0], *x[1:], bound=1.0),
    "order=4; match_sums takes 2": lambda x: match_sums(jax.random.key(0), num_examples=1, order=4),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message](drawn(dtype=np.float32))
