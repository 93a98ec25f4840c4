"""The platform's own attention: for which calls it is, that it is called, and what it is asked for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, normals

from jaxseq import ops
from jaxseq.ops.fused_attention import unfit

FITTING = {
    "causal": {},
    "causal window": dict(window=3),
    "window of all": dict(window=50),
    "both ways": dict(causal=False, past=1),
    "both ways, more keys": dict(causal=False, past=5),
    "one query head a key head": dict(groups=4),
}
UNFIT = {
    "float32": (dict(dtype=jnp.float32), "bfloat16 or in float16; they are in float32"),
    "mixed": (dict(value_dtype=jnp.float16), "they are in bfloat16, float16"),
    "width": (dict(width=20), "a multiple of 8 up to 256; they are 20 and 20 wide"),
    "value width": (dict(value_width=32), "they are 16 and 32 wide"),
    "wide": (dict(width=264), "they are 264 and 264 wide"),
    "more keys": (dict(past=5), "as many keys as queries where it is causal; there are 12 and 7"),
    "window both ways": (dict(causal=False, window=3), "causal alone; window=3"),
    "odd keys both ways": (dict(causal=False), "an even number of keys where it is not causal; there are 7"),
    "segments": (dict(segment_ids=jnp.zeros((2, 7), jnp.int32)), "no segment_ids"),
    "soft cap": (dict(logit_softcap=5.0), "no logit_softcap"),
    "decay and span": (dict(log_decay=jnp.zeros((2, 7, 4)), span=jnp.ones(4)), "no log_decay, span"),
}


def arguments(width=16, value_width=None, dtype=jnp.bfloat16, value_dtype=None, groups=2, past=0, **options):
    shapes = (2, 7, 4, width), (2, past + 7, groups, width), (2, past + 7, groups, value_width or width)
    q, k, v = normals(np.random.default_rng(0), tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))
    return dict(
        query=jnp.asarray(q, dtype), key=jnp.asarray(k, dtype), value=jnp.asarray(v, value_dtype or dtype)
    ), options


@pytest.fixture
def cudnn(monkeypatch):
    """As if there were one, which lowering alone needs."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize("name", FITTING)
def test_cudnn_is_called_forward_and_backward(name, cudnn):
    arrays, options = arguments(**FITTING[name])
    attend = lambda arrays: ops.softmax_attention(**arrays, **options, impl="fused")
    loss = lambda arrays: jnp.sum(attend(arrays).astype(jnp.float32))
    lowered = jax.jit(jax.value_and_grad(loss)).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaSoftmax(" in lowered and "@__cudnn$fmhaSoftmaxBackward(" in lowered
    with pytest.raises(NotImplementedError, match="not found for platform cpu"):
        jax.jit(attend)(arrays)


@pytest.mark.parametrize("name", FITTING)
def test_what_is_asked_of_cudnn_is_the_definition(name, monkeypatch):
    """XLA computes what cuDNN is asked for: masks, groups, scale and gradients."""
    asked = []

    def instead(*arrays, implementation, **options):
        asked.append(implementation)
        return attention(*arrays, implementation="xla", **options)

    attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    arrays, options = arguments(**FITTING[name])

    def everything(arrays, impl):
        o, pull_back = jax.vjp(lambda arrays: ops.softmax_attention(**arrays, **options, impl=impl), arrays)
        return o, pull_back(jnp.ones_like(o))

    with jax.numpy_dtype_promotion("standard"):
        found = jax.jit(partial(everything, impl="fused"))(arrays)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    assert_close(found, jax.jit(partial(everything, impl="sequential"))(wide), "bfloat16 gradient")
    assert asked == ["cudnn"]


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_not_for_cudnn_is_refused(name, cudnn):
    options, words = UNFIT[name]
    arrays, options = arguments(**options)
    with pytest.raises(NotImplementedError, match=f"impl='fused' of softmax_attention takes .*{words}"):
        ops.softmax_attention(**arrays, **options, impl="fused")


def test_the_predicate_takes_shapes():
    shape = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
    assert unfit(shape, shape, shape, True, None, []) is None


def test_without_cudnn_it_says_so():
    arrays, _ = arguments()
    with pytest.raises(NotImplementedError, match="impl='fused' .* takes an NVIDIA GPU whose cuDNN does this: cuDNN"):
        ops.softmax_attention(**arrays, impl="fused")
