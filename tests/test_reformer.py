"""Attention among tokens that hash alike: recorded values, the dense form it becomes, and what rounds make better."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, random_params
from recorded import load, recorded
from sampled import by_default

from jaxseq import ops
from jaxseq.mixers import Reformer
from jaxseq.ops.lsh_attention import ITSELF, LARGEST_FACTOR, bucket_factors, hashed, num_buckets


def dense(qk, v, causal=False, ids=None):
    """Of all pairs, with keys of unit size and itself last of all."""
    key = qk / jnp.linalg.norm(qk, axis=-1, keepdims=True)
    s = jnp.einsum("bthk,bshk->bhts", qk, key) / qk.shape[-1] ** 0.5
    s = jnp.where(jnp.eye(qk.shape[1], dtype=bool)[None, None], ITSELF, s)
    s = jnp.where(jnp.tri(qk.shape[1], dtype=bool)[None, None], s, -jnp.inf) if causal else s
    s = s if ids is None else jnp.where((ids[:, :, None] == ids[:, None])[:, None], s, -jnp.inf)
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(s), v)


def drawn(length, heads=2, width=8, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((2, length, heads, width)), dtype) for _ in range(2))


def rotations(length, bucket_size, rounds=2, width=8, seed=0):
    axes = sum(bucket_factors(num_buckets(length, bucket_size))) // 2
    return jnp.asarray(np.random.default_rng(seed).standard_normal((width, rounds, axes)), jnp.float32)


@recorded
def test_recorded():
    z = load("efficient_transformers")
    qk, v = (jnp.asarray(z[f"lsh.{name}"], jnp.float32)[:, :, None] for name in ("qk", "v"))
    turns = jnp.asarray(z["lsh.rotations"][0], jnp.float32)
    buckets = hashed(qk.swapaxes(1, 2), turns, (8,))[:, 0]
    np.testing.assert_array_equal(np.asarray(buckets) + 8 * np.arange(2)[:, None], z["lsh.buckets"])
    for name, causal in (("noncausal", False), ("causal", True)):
        o = ops.lsh_attention(qk, v, turns, bucket_size=int(z["lsh.bucket_size"]), causal=causal)
        np.testing.assert_allclose(o[:, :, 0], z[f"lsh.{name}"], atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "length, bucket_size, count_once", by_default([(32, 16, True)], [(21, 64, False), (21, 21, True), (32, 16, True)])
)
def test_one_bucket_or_two_that_meet_are_dense(length, bucket_size, count_once, causal):
    """With two buckets every chunk sees both: counted once, that is everything."""
    qk, v = drawn(length)
    turns = rotations(length, bucket_size)
    options = dict(bucket_size=bucket_size, causal=causal, count_once=count_once)
    ids = jnp.asarray([[0] * 9 + [1] * (length - 9)] * 2)
    for segment_ids in (None, ids):
        form = lambda x, segment_ids=segment_ids: ops.lsh_attention(*x, turns, segment_ids=segment_ids, **options)
        plain = lambda x, segment_ids=segment_ids: dense(*x, causal, segment_ids)
        value = lambda f: jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(f(x)))))((qk, v))
        assert_close(value(form), value(plain), "mixer")


@pytest.mark.slow
def test_it_nears_dense_attention_with_rounds():
    """On keys in clusters, as the sheet measured; counted once it is nearer."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((16, 16))
    points = centres[rng.integers(0, 16, (2, 256))] + 0.3 * rng.standard_normal((2, 256, 16))
    qk = jnp.asarray(3 * points, jnp.float32)[:, :, None]
    v = jnp.asarray(rng.standard_normal((2, 256, 1, 16)), jnp.float32)
    exact = dense(qk, v)

    def error(rounds, **options):
        draws = [rotations(256, 16, rounds, 16, seed) for seed in range(4)]
        outputs = (ops.lsh_attention(qk, v, turns, bucket_size=16, **options) for turns in draws)
        return np.mean([np.linalg.norm(o - exact) for o in outputs]) / np.linalg.norm(exact)

    errors = [error(rounds) for rounds in (1, 2, 4, 8)]
    assert all(later < 0.95 * earlier for earlier, later in zip(errors, errors[1:], strict=False))
    assert error(8, count_once=True) < errors[-1]


@pytest.mark.parametrize("length", by_default([31], [1, 5, 17, 31]))
def test_any_length_is_finite_and_segments_are_apart(length):
    qk, v = drawn(length)
    turns = rotations(length, 4)
    ids = jnp.asarray([[0] * (length // 2) + [1] * (length - length // 2)] * 2)
    call = jax.jit(lambda qk, v: ops.lsh_attention(qk, v, turns, bucket_size=4, causal=True, segment_ids=ids))
    zero = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(call(*x)))))((0 * qk, v))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(zero))
    other = v.at[:, : length // 2].add(1.0)
    np.testing.assert_array_equal(call(qk, other)[:, length // 2 :], call(qk, v)[:, length // 2 :])


def test_many_buckets_are_factorised():
    """Above the largest number that one rotation tells apart; as many in all, or little more."""
    assert bucket_factors(1) == () and bucket_factors(2) == (2,)
    assert bucket_factors(LARGEST_FACTOR) == (LARGEST_FACTOR,) and bucket_factors(LARGEST_FACTOR + 2) == (12, 12)
    for buckets in range(2, 40_000, 14):
        factors = bucket_factors(buckets)
        assert max(factors) <= LARGEST_FACTOR and not any(n % 2 for n in factors)
        assert buckets <= math.prod(factors) <= 1.5 * buckets
        assert sum(factors) <= max(LARGEST_FACTOR, 3 * len(factors) * buckets ** (1 / len(factors)))


def test_factors_hash_near_vectors_alike():
    """Each factor is the bucket of its own axes, and all of them make one number below their product."""
    rng = np.random.default_rng(0)
    far = rng.standard_normal((3, 400, 8))
    x, near, far = far[0], far[0] + 0.2 * far[1], far[2]
    turns, factors = rng.standard_normal((8, 5, 5)), (6, 4)
    hash_of = jax.jit(lambda x: hashed(x[None, None], jnp.asarray(turns, jnp.float32), factors)[0, 0])
    found, close, other = (np.asarray(hash_of(jnp.asarray(a, jnp.float32))) for a in (x, near, far))
    turned = np.einsum("tk,krn->rtn", x, turns)
    one, two = (np.argmax(np.concatenate([t, -t], axis=-1), axis=-1) for t in (turned[..., :3], turned[..., 3:]))
    np.testing.assert_array_equal(found, one + 6 * two)
    assert found.min() >= 0 and found.max() < 24 and len(np.unique(found)) == 24
    assert (found == close).mean() > 0.5 > 5 * (found == other).mean()


def test_memory_is_linear_in_time():
    """Buckets as many as a quarter of the tokens: without factors each token has a number for every bucket."""

    def temporaries(length):
        shape, turns = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32), rotations(length, 4)
        run = jax.jit(lambda qk, v, turns: ops.lsh_attention(qk, v, turns, bucket_size=4))
        return run.lower(shape, shape, turns).compile().memory_analysis().temp_size_in_bytes

    assert len(bucket_factors(num_buckets(1024, 4))) == 2
    assert temporaries(4096) < 4**1.3 * temporaries(1024)


def test_padding_falls_into_no_bucket_of_several_factors():
    """As many buckets as tokens, in two factors: tokens that the mask leaves out change nothing, whatever they hold."""
    qk, v = drawn(140, heads=1)
    mask = jnp.broadcast_to(jnp.arange(140) < 90, (2, 140))
    turns = rotations(140, 1)
    call = jax.jit(lambda qk, v: ops.lsh_attention(qk, v, turns, bucket_size=1, mask=mask)[:, :90])
    o = call(qk, v)
    assert np.isfinite(o).all()
    np.testing.assert_array_equal(call(qk.at[:, 90:].multiply(-3.0), v.at[:, 90:].add(1.0)), o)


def test_the_gradient_is_causal():
    qk, v = drawn(19)
    turns = rotations(19, 4)
    read = lambda v: jnp.sum(ops.lsh_attention(qk, v, turns, bucket_size=4, causal=True)[:, 7])
    slope = jax.jit(jax.grad(read))(v)
    assert (slope[:, 8:] == 0).all() and (slope[:, :8] != 0).any()


def test_an_rng_redraws_the_rotations():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 40, 8)), jnp.float32)
    module = Reformer(8, num_heads=2, bucket_size=4)
    params, apply = random_params(module, x), jax.jit(module.apply)
    same, again = apply(params, x), apply(params, x)
    np.testing.assert_array_equal(same, again)
    redrawn = apply(params, x, rngs={"features": jax.random.key(1)})
    assert np.abs(redrawn - same).max() > 1e-3
    short = Reformer(8, num_heads=2, bucket_size=4, dtype=jnp.bfloat16)
    short = jax.jit(short.apply)(params, x.astype(jnp.bfloat16))
    assert short.dtype == jnp.bfloat16 and np.isfinite(short.astype(jnp.float32)).all()


BAD = {
    "bucket_size=0; lsh_attention takes 1": lambda qk, v: ops.lsh_attention(qk, v, rotations(9, 4), bucket_size=0),
    "rotations have 2 axes; 9 tokens in 2": lambda qk, v: ops.lsh_attention(qk, v, rotations(9, 4), bucket_size=8),
    "rounds=0; Reformer takes 1": lambda qk, v: Reformer(8, rounds=0).init(jax.random.key(0), qk[:, :, 0]),
    "num_heads=3 does not divide": lambda qk, v: Reformer(8, num_heads=3).init(jax.random.key(0), qk[:, :, 0]),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message](*drawn(9))
