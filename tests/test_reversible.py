"""Reversible stacks: the equations, their gradient by undoing layers, and memory that does not grow with depth."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FULL_MIXERS, MIXERS, assert_close, cast, random_params
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxseq import GLA, Attention, LanguageModel
from jaxseq.layers.gated_mlp import GatedMLP
from jaxseq.layers.self_attention import SelfAttention
from jaxseq.mixers import LongConv, MinGRU, Reformer, SelectiveAttention
from jaxseq.models.block import Stack
from jaxseq.sharded import AXIS

VOCAB, WIDTH, LENGTH = 7, 8, 6
attention, gla, gru = partial(Attention, num_heads=2), partial(GLA, num_heads=2), MinGRU
tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH)), jnp.int32)
packed = jnp.asarray([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]])


def drawn(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def undone_and_kept(model, apply, *args):
    """Value and gradients of what the model does by undoing its layers, and by keeping all activations."""
    gradient = lambda remat: jax.value_and_grad(partial(apply, model.clone(remat=remat)), has_aux=True)
    return jax.jit(lambda *args: [gradient(remat)(*args) for remat in (True, False)])(*args)


def test_two_streams_as_in_the_equations():
    """y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁) written out, in value and gradient, in float64."""
    stack = Stack(WIDTH, (gru, attention) * 2, reversible=True)
    x = drawn(np.random.default_rng(0), 2, LENGTH, WIDTH)
    params = random_params(stack, x)

    def written_out(params, x):
        norm = lambda x, scale: x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale[None, None]
        first = second = x
        for repeat in range(2):
            for i, mixer in enumerate((gru(WIDTH), attention(WIDTH))):
                block = jax.tree.map(lambda x, repeat=repeat: x[repeat], params["params"]["layers"][f"block_{i}"])
                read = norm(second, block["mixer_norm"]["scale"])
                first = first + mixer.apply({"params": block["mixer"]}, read)
                read = norm(first, block["mlp_norm"]["scale"])
                second = second + GatedMLP(WIDTH).apply({"params": block["mlp"]}, read)
        return norm((first + second) / 2, params["params"]["norm"]["scale"])

    forms = (lambda *args: stack.apply(*args)[0]), written_out
    loss = lambda form, *args: jnp.sum(jnp.sin(form(*args)))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        args = cast((params, x), jnp.float64)
        run = lambda *args: [jax.value_and_grad(partial(loss, form), argnums=(0, 1))(*args) for form in forms]
        ours, expected = jax.jit(run)(*args)
        assert_close(ours, expected, 1e-8)


def test_shared_layers_sum_their_gradients():
    """Undone, they are layers that happen to be equal, and padding is kept from each of them."""
    slots = (partial(SelfAttention, num_heads=2), gru) * 2
    shared, free = (Stack(WIDTH, slots, mlp=None, reversible=True, shared=one) for one in (True, False))
    x, lengths = drawn(np.random.default_rng(0), 2, LENGTH, WIDTH), jnp.asarray([4, LENGTH])
    params = random_params(shared, x)
    of_layers = lambda params, change: {
        "params": params["params"] | {"layers": jax.tree.map(change, params["params"]["layers"])}
    }
    repeated = of_layers(params, lambda x: jnp.broadcast_to(x[None], (2, *x.shape)))

    def loss(stack, params):
        y = stack.apply(params, x, lengths=lengths)[0]
        return jnp.sum(jnp.sin(y[0, :4])) + jnp.sum(jnp.sin(y[1])), y[0, :4]

    gradient = lambda stack, params: jax.value_and_grad(partial(loss, stack), has_aux=True)(params)
    both = jax.jit(lambda params, repeated: (gradient(shared, params), gradient(free, repeated)))
    (value, summed), (expected, apart) = both(params, repeated)
    assert_close((value, summed), (expected, of_layers(apart, lambda x: x.sum(0))), 1e-4)
    alone = jax.jit(shared.apply)(params, x[:1, :4])[0][0]
    assert_close(value[1], alone, "mixer")


@pytest.mark.slow
def test_a_state_has_its_gradient():
    """Undoing goes through prefilled layers too: packed, from a state, with no mlp, to the states that it returns."""
    model = LanguageModel(VOCAB, WIDTH, (gla, None, attention, None) * 2, mlp=None, reversible=True)
    params = random_params(model, tokens)
    start = lambda: model.init_state(2, max_length=LENGTH)

    def loss(model, params, numbers):
        state = jax.tree.map(
            lambda new, old: old if new is None else new, numbers, start(), is_leaf=lambda x: x is None
        )
        logits, after = model.apply(params, tokens, state, packed, method="prefill")
        floats = [x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
        return jnp.sum(jnp.sin(logits)) + sum(jnp.sum(jnp.sin(x)) for x in floats), after

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        rng = np.random.default_rng(1)
        float64 = lambda x: jnp.asarray(rng.standard_normal(x.shape)) if jnp.issubdtype(x.dtype, jnp.floating) else None
        numbers, wide = jax.tree.map(float64, start()), cast(params, jnp.float64)
        both = lambda *args: [
            jax.value_and_grad(partial(loss, model.clone(remat=r)), (0, 1), has_aux=True)(*args) for r in (True, False)
        ]
        undone, kept = jax.jit(both)(wide, numbers)
        assert np.abs(jax.tree.leaves(undone[1][1])[0]).max() > 1e-3
        assert_close(undone, kept, 1e-8)


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_call_is_prefill_and_steps(shared):
    other = partial(LongConv, max_length=LENGTH) if shared else gla
    model = LanguageModel(VOCAB, WIDTH, (other, attention) * 2, reversible=True, shared=shared)
    params = random_params(model, tokens)

    @jax.jit
    def both(params):
        state = model.init_state(2, max_length=LENGTH)
        prompt, state = model.apply(params, tokens[:, :3], state, method="prefill")
        step = lambda state, token: model.apply(params, token, state, method="step")[::-1]
        after, steps = jax.lax.scan(step, state, tokens[:, 3:].T)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        return model.apply(params, tokens), jnp.concatenate([prompt, steps.swapaxes(0, 1)], axis=1)

    whole, decoded = both(params)
    assert_close(decoded, whole, "mixer")


@pytest.mark.slow
def test_random_masks_are_drawn_again_the_same():
    """Dropout and rotations, in both passes; and layers that look at the whole sequence, which have no state."""
    stack = Stack(WIDTH, (partial(Reformer, num_heads=2, bucket_size=1),) * 2, dropout=0.3, reversible=True)
    x = drawn(np.random.default_rng(0), 2, LENGTH, WIDTH)
    params = random_params(stack, x)

    def loss(stack, params, x, seed):
        rngs = {name: jax.random.fold_in(jax.random.key(1), seed) for name in ("dropout", "features")}
        y = stack.apply(params, x, None, packed, rngs=rngs)[0]
        return jnp.sum(jnp.sin(y)), y

    draws = [undone_and_kept(stack, loss, params, x, seed) for seed in jnp.arange(2)]
    for undone, kept in draws:
        assert_close(undone, kept, 1e-4)
    assert np.abs(draws[0][0][0][1] - draws[1][0][0][1]).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_MIXERS)
def test_every_mixer(name):
    stack = Stack(WIDTH, (lambda d_model, **fields: MIXERS[name].build(**fields),) * 2, mlp=None, reversible=True)
    x = drawn(np.random.default_rng(0), 2, LENGTH, WIDTH)
    params = jax.jit(stack.init)(jax.random.key(0), x)
    loss = lambda stack, params, x: (jnp.sum(jnp.sin(stack.apply(params, x, None, packed)[0])), None)
    assert_close(*undone_and_kept(stack, loss, params, x), 1e-3)


class Ones(nn.Module):
    """A branch of ones."""

    d_model: int
    dtype: Any = None
    param_dtype: Any = None

    def __call__(self, x, segment_ids=None):
        return jnp.ones_like(x)


def test_layers_and_branches_drop_apart():
    """The mean of two streams that start at zero: a mask of each of four branches, no two of them the same."""
    stack = Stack(64, (Ones,) * 2, mlp=Ones, dropout=0.5, reversible=True)
    x = jnp.zeros((2, 3, 64))
    params = jax.jit(stack.init)(jax.random.key(0), x)
    y = np.asarray(jax.jit(lambda: stack.apply(params, x, rngs={"dropout": jax.random.key(0)})[0])())
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1], y.shape))
    levels, counts = np.unique((4 * y[:, 0] / y[:, 0].max(-1, keepdims=True)).round(3), return_counts=True)
    np.testing.assert_allclose(levels, range(5))
    assert counts.argmax() == 2  # of a binomial; masks that are the same would leave 0, 2 and 4 alone


@pytest.mark.slow
def test_what_layers_sow_comes_out_and_has_its_gradient():
    slots = (partial(SelectiveAttention, num_heads=2, selection_loss=3.0, budget=1), gru) * 2
    models = [LanguageModel(VOCAB, WIDTH, slots, reversible=r) for r in (True, False)]
    params = random_params(models[0], tokens)

    def loss(model, params):
        logits, sown = model.apply(params, tokens, mutable=["losses"])
        return jnp.mean(logits**2) + sum(jnp.sum(x) for x in jax.tree.leaves(sown)), sown

    undone, kept = undone_and_kept(models[0], loss, params)
    assert_close(undone, kept, 1e-4)
    ((path, cost),) = jax.tree.leaves_with_path(undone[0][1])
    ((plain, other),) = jax.tree.leaves_with_path(jax.eval_shape(partial(loss, models[1]), params)[1])
    assert path == plain and cost.shape == other.shape == (2,)


@pytest.mark.slow
def test_twelve_layers_in_float32():
    """What undoing rounds, as models start: 1e-5 of the gradient of each parameter (survey, arXiv 2103.14636)."""
    model = LanguageModel(VOCAB, WIDTH, (gru, attention) * 6, reversible=True)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    loss = lambda model, params: (jnp.mean(jnp.sin(model.apply(params, tokens))), None)
    assert_close(*undone_and_kept(model, loss, params), 1e-5)


@pytest.mark.slow
def test_half_precision_has_streams_of_float32():
    """Undoing sums in bfloat16 would lose what they hold."""
    stack = Stack(WIDTH, (gru,) * 6, reversible=True, dtype=jnp.bfloat16)
    x = drawn(np.random.default_rng(0), 2, LENGTH, WIDTH).astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        params = random_params(stack, x)
        loss = lambda stack, params: (jnp.sum(stack.apply(params, x)[0].astype(jnp.float32) ** 2), None)
        undone, kept = undone_and_kept(stack, loss, params)
        assert stack.apply(params, x)[0].dtype == jnp.bfloat16
    assert_close(undone, kept, "mixer bfloat16")


def test_time_over_devices():
    stack = Stack(WIDTH, (gru,) * 2, reversible=True)
    x = drawn(np.random.default_rng(0), 2, 8, WIDTH)
    params = random_params(stack, x)
    mesh = jax.make_mesh((2,), (AXIS,), axis_types=(AxisType.Auto,))
    call = lambda params, x: stack.apply(params, x)[0]
    split = jax.shard_map(call, mesh=mesh, in_specs=(P(), P(None, AXIS)), out_specs=P(None, AXIS))
    gradient = lambda form: jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(form(*args))), (0, 1))
    actual, expected = jax.jit(lambda *args: [gradient(form)(*args) for form in (split, call)])(params, x)
    assert_close(actual, expected, 1e-4)


def temporaries(slot, depth, **fields):
    """Bytes that the gradient of a stack takes, beside its arguments and results."""
    stack = Stack(WIDTH, (slot,) * depth, **fields)
    x = jax.ShapeDtypeStruct((4, 128, WIDTH), jnp.float32)
    params = jax.eval_shape(stack.init, jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(jnp.sin(stack.apply(params, x)[0])), argnums=(0, 1)))
    return gradient.lower(params, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "slot",
    [gru, pytest.param(partial(Reformer, num_heads=2, bucket_size=16), marks=pytest.mark.slow)],
    ids=["gru", "reformer"],
)
def test_memory_is_flat_in_depth(slot):
    """Gradients of the parameters are results; what is beside them is that of one layer, where undoing is on."""
    flat = {depth: temporaries(slot, depth, reversible=True) for depth in (2, 8)}
    kept = {depth: temporaries(slot, depth, remat=False) for depth in (2, 8)}
    one_stream = 4 * 128 * WIDTH * 4
    assert flat[8] - flat[2] < one_stream
    assert kept[8] - kept[2] > 6 * 10 * one_stream
    assert flat[8] < kept[8] / 3


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prenorm": False}, "prenorm=False: a norm of the sum cannot be undone"),
        ({"remat_policy": jax.checkpoint_policies.dots_saveable}, "says what is saved; reversible=True"),
    ],
)
def test_what_cannot_be_undone_is_refused(fields, message):
    stack = Stack(WIDTH, (gru,), reversible=True, **fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(stack.init, jax.random.key(0), jnp.zeros((1, 2, WIDTH)))
