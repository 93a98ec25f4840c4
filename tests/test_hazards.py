"""What once stopped or slowed a run, kept out by reading the compiled programs."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FULL_MIXERS, MIXERS, OPS, WIDTH, assert_close, cast
from sampled import by_default

from jaxseq import ops

# Batched LAPACK calls fan out into the thread pool they run on, and deadlock on a machine of few cores.
LAPACK = re.compile(
    r'custom_call_target="[^"]*(lapack|getrf|trsm|eigh|syevd|potrf|gesdd|geqrf|triangular)[^"]*"|cholesky\('
)


def lowered_gradient(function, *args):
    """Forward and backward before the optimiser, where every call stands, as in compiled text."""
    loss = lambda *args: sum(jnp.abs(x).sum() for x in jax.tree.leaves(function(*args)) if x.dtype != jnp.int32)
    return jax.jit(jax.grad(loss)).trace(*args).lower().as_text(dialect="hlo")


SOLVERS = ("delta_rule per channel", "dplr_recurrence", "delta_product", "mesa", "path_attention")
#: The delta rule is in its product, whose inverse attention along a path takes; `mesa` takes conjugate gradients.
ONE_OF_EACH = ("dplr_recurrence", "delta_product")


def test_the_pattern_sees_lapack():
    text = lowered_gradient(lambda a: jnp.linalg.solve(a, a[..., :1]), jnp.eye(3)[None].repeat(4, 0))
    assert LAPACK.search(text) or "triangular-solve" in text


@pytest.mark.parametrize("name", by_default(ONE_OF_EACH, [n for n, m in OPS.items() if m.sweep or n in SOLVERS]))
def test_no_lapack_in_ops(name):
    inputs = cast(OPS[name].inputs(np.random.default_rng(0), 9, "mild"), jnp.float32)
    for impl in (None, *OPS[name].forms):
        text = lowered_gradient(lambda inputs, impl=impl: OPS[name].call(inputs, None, impl), inputs)
        assert not LAPACK.search(text) and "triangular-solve" not in text


CHUNKED = [n for n in OPS if n.startswith(("gla", "delta_rule", "dplr_rec", "log_linear"))]


@pytest.mark.parametrize("name", by_default(["gla per channel", "dplr_recurrence", "log_linear_attention"], CHUNKED))
def test_the_gradient_of_a_chunked_form_is_no_longer_for_longer_sequences(name):
    """A substitution or a scan that Python unrolls takes a minute to compile."""
    if "chunked" not in OPS[name].forms:
        pytest.skip("no chunks")

    def size(T):
        inputs = cast(OPS[name].inputs(np.random.default_rng(0), T, "mild"), jnp.float32)
        return len(lowered_gradient(lambda inputs: OPS[name].call(inputs, None, "chunked"), inputs).splitlines())

    assert size(256) == size(64) < 4000


STATES = [n for n in OPS if n.startswith(("gla", "delta", "dplr_rec", "log_linear", "slot_attention", "mesa"))]
ROUNDED = [n for n in STATES if OPS[n].sweep or n in ("gla bonus", "slot_attention", "mesa", "delta_product")]


@pytest.mark.parametrize("name", by_default(ROUNDED, STATES))
def test_no_accelerator_rounds_float32(name):
    """By default a TPU multiplies float32 as bfloat16, and a GPU as TF32: decoding would not be what prefill is."""
    for T in (1, 9):
        inputs = cast(OPS[name].inputs(np.random.default_rng(0), T, "mild"), jnp.float32)
        for impl in (None, "sequential"):
            traced = jax.jit(lambda inputs, impl=impl: OPS[name].call(inputs, None, impl)).trace(inputs)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            products = [line for line in text.splitlines() if "dot_general" in line]
            assert not [line for line in products if "HIGHEST" not in line]


@pytest.mark.parametrize("name", FULL_MIXERS)
def test_no_lapack_in_mixers(name):
    module, x = MIXERS[name].build(), jnp.zeros((2, 9, WIDTH))
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    assert not LAPACK.search(lowered_gradient(module.apply, params, x))


def compiled_gradient(function, *args):
    loss = lambda args: sum(jnp.sum(x * x) for x in jax.tree.leaves(function(*args)))
    return jax.jit(jax.grad(loss)).lower(args).compile()


def test_the_recurrence_does_not_copy_its_buffer_every_step():
    """Automatic differentiation of a loop that writes in place copies all states at every step: T² work."""
    B, T, D = 1, 4096, 32
    arrays = jnp.ones((B, T, D)), jnp.ones((B, T, D))
    compiled = compiled_gradient(ops.linear_recurrence, *arrays)
    activation = B * T * D * 4
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * activation
    bodies = _loop_bodies(compiled.as_text())
    assert bodies
    for body in bodies:
        copied = re.findall(rf"= f32\[(?:{B},{T},{D}|{T},{B},{D})\][^=]*? copy\(", body)
        assert not copied, f"a loop copies the whole buffer at every step: {copied}"


def _loop_bodies(text):
    """The computations that while loops run, by name."""
    names = set(re.findall(r"body=%?([\w.\-]+)", text))
    blocks = re.findall(r"^%?([\w.\-]+) \(.*?\) -> .*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in blocks if name in names]


def temporary_bytes(function, *args):
    return compiled_gradient(function, *args).memory_analysis().temp_size_in_bytes


def test_chunked_linear_attention_keeps_no_state_per_step():
    """`parallel` keeps a K×V state a step, `chunked` one a chunk and the scores of the chunk at work."""
    q, k, v, g = (jnp.ones((1, 512, 2, 32)) for _ in range(4))
    memory = {
        impl: temporary_bytes(partial(ops.gated_linear_attention, impl=impl), q, k, v, -g)
        for impl in ("chunked", "parallel")
    }
    assert memory["chunked"] * 3 < memory["parallel"], memory


def test_chunked_selective_scan_keeps_no_state_per_step():
    """The backward pass of Mamba holds less than one array of all states `T D N`; `parallel` holds fourteen."""
    T, D, N = 4096, 16, 16
    x, BC = jnp.ones((1, T, D)), jnp.ones((1, T, N))
    assert temporary_bytes(ops.selective_scan, x, x, -jnp.ones((D, N)), BC, BC) < 0.75 * T * D * N * 4


@pytest.mark.parametrize("impl", ["sequential", "parallel", "chunked"])
def test_decays_between_tokens_that_strong_ones_are_far_behind(impl):
    """One running sum in float32 would be off by hundreds of roundings of its own size at the end."""
    rng, (T, heads) = np.random.default_rng(0), (1500, 2)
    q, k, v = (rng.standard_normal((1, T, heads, 4)) for _ in range(3))
    log_decay = np.concatenate([np.full((1, T - 100, heads), -200.7), np.full((1, 100, heads), -0.1)], axis=1)
    attend = lambda inputs, impl: ops.softmax_attention(*inputs[:3], log_decay=inputs[3], impl=impl)[:, -100:]
    run = lambda impl, dtype: jax.jit(partial(attend, impl=impl))(cast((q, k, v, log_decay), dtype))
    with jax.enable_x64(True):
        expected = run("sequential", jnp.float64)
    assert_close(run(impl, jnp.float32), expected, "float32")
