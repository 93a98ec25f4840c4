"""Attention along reflections: keys of earlier calls are met as in one call, and without β it is attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close
from sampled import by_default

from jaxseq import ops

LENGTH, PAST = 11, 3  # fewer tokens than a key has channels in one call, more in the other


def drawn():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    w = draw(2, LENGTH, 2, 4)
    i = dict(query=draw(2, LENGTH, 4, 4), key=draw(2, LENGTH, 2, 4), value=draw(2, LENGTH, 2, 3))
    i["direction"], i["beta"] = (
        w / jnp.linalg.norm(w, axis=-1, keepdims=True),
        2 * jax.nn.sigmoid(draw(2, LENGTH, 2)),
    )
    return i | {"log_decay": -jnp.abs(draw(2, LENGTH, 4))}


def in_two_calls(i, **options):
    """The second call has the keys that the first one left."""
    part = lambda at: {name: x[:, at] for name, x in i.items()}
    first, second = part(slice(PAST)), part(slice(PAST, None))
    older = ops.reflected_keys(*(first[name] for name in ("key", "direction", "beta")))
    cached = {"key": older, "value": first["value"], "log_decay": first["log_decay"]}
    second |= {name: jnp.concatenate([x, second[name]], axis=1) for name, x in cached.items()}
    outputs = [ops.path_attention(**inputs, **options) for inputs in (first, second)]
    after = [second[name] for name in ("key", "direction", "beta")]
    return jnp.concatenate(outputs, axis=1), ops.reflected_keys(*after)


FORMS = [dict(impl="sequential"), dict(impl="parallel"), dict(impl="chunked", chunk_size=4)]


@pytest.mark.parametrize("options", by_default(FORMS[2:], FORMS))
def test_keys_of_an_earlier_call(options):
    """In value and gradient, and what both calls leave is what one leaves."""

    def at_once(i):
        keys = ops.reflected_keys(i["key"], i["direction"], i["beta"])
        return ops.path_attention(**i, impl="sequential"), keys

    def both(f):
        weighted = lambda i: sum(jnp.sum(jnp.sin(x)) for x in f(i))
        return jax.jit(lambda i: (f(i), jax.grad(weighted)(i)))

    with jax.enable_x64(True):
        i = drawn()
        assert_close(both(lambda i: in_two_calls(i, **options))(i), both(at_once)(i), "float64")


def test_without_beta_it_is_attention():
    """And one reflection turns a key along w round, seen from every later query."""
    i = drawn()
    still = i | {"beta": jnp.zeros_like(i["beta"])}
    plain = jax.jit(lambda i: ops.softmax_attention(i["query"], i["key"], i["value"], log_decay=i["log_decay"]))
    assert_close(jax.jit(lambda i: ops.path_attention(**i))(still), plain(i), "float32")
    once = jnp.zeros_like(i["beta"]).at[:, 5].set(2.0)
    keys = jax.jit(ops.reflected_keys)(
        i["direction"], jnp.broadcast_to(i["direction"][:, 5:6], i["direction"].shape), once
    )
    along = jnp.einsum("bsgk,bgk->bsg", i["direction"], i["direction"][:, 5])[..., None] * i["direction"][:, 5:6]
    np.testing.assert_allclose(keys[:, :5], (i["direction"] - 2 * along)[:, :5], atol=1e-6)
    np.testing.assert_allclose(keys[:, 5:], i["direction"][:, 5:], atol=1e-6)


def test_memory_grows_with_time_not_with_its_square():
    """Forward and backward in chunks: twice the tokens, and about twice the temporaries."""

    def temporaries(length):
        shape = lambda *s: jax.ShapeDtypeStruct((1, length, *s), jnp.float32)
        args = (shape(1, 8), shape(1, 8), shape(1, 8), shape(1, 8), shape(1))
        loss = lambda *a: jnp.sum(ops.path_attention(*a, chunk_size=16, impl="chunked"))
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 2.5 * temporaries(1024)
