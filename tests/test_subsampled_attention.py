"""Subsampled attention: the recorded outputs, exact limits, costs, and what training and evaluation do with it."""

from functools import partial
from itertools import product
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import WIDTH, assert_close, random_params
from recorded import load, recorded
from sampled import by_default

from jaxseq import Attention, LanguageModel, ops
from jaxseq.analysis import self_ensemble
from jaxseq.mixers import SubsampledAttention
from jaxseq.models.block import Stack
from jaxseq.ops.subsampled_attention import SUBSETS, num_scores

MODES = pytest.mark.parametrize("mode", SUBSETS)
BY_TOKENS = ("window", "local")


def dense(q, k, v, mask):
    """Softmax attention of `B T H K` arrays under a mask `T S`."""
    logits = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.where(mask, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    return np.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdims=True), v)


def mask_of(sets, mode, length):
    """Which sources a query sees, from the sets alone."""
    seen = np.zeros((length, length), bool)
    for r, own in enumerate(np.asarray(sets)):
        run = length // len(sets)
        queries = own if mode in BY_TOKENS else np.arange(r * run, (r + 1) * run)
        seen[np.ix_(queries, own)] = True
    return seen


def tensors(length, dtype=np.float64):
    rng = np.random.default_rng(length)
    return [jnp.asarray(rng.standard_normal((2, length, 4, 6)), dtype) for _ in range(3)]


# ---- the op ---------------------------------------------------------------------------------------------------------


@recorded
@pytest.mark.parametrize("causal", [True, False])
@MODES
def test_recorded_outputs(mode, causal):
    golden, w = load("ssa_windows"), int(load("ssa_windows")["window"])
    names = {"window": "uniform", "local": "local", "truncate": "truncate", "local_source": "source_local"}
    name = f"{names[mode]}_{'causal' if causal else 'bidir'}"
    if name not in golden:
        pytest.skip("not recorded")
    permutations = golden["perm_uniform" if mode in ("window", "truncate") else "perm_local"]
    attend = jax.jit(partial(ops.subsampled_attention, queries_too=mode in BY_TOKENS, causal=causal))
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(golden[n].swapaxes(1, 2)) for n in "qkv")
        for permutation, expected in zip(permutations, golden[name], strict=True):
            sets = jnp.asarray(np.sort(permutation.reshape(-1, w), axis=1)[: 1 if mode == "truncate" else None])
            o = attend(q, k, v, sets)
            assert_close(o, expected.swapaxes(1, 2), "float64")


@recorded
def test_sets_of_the_recorded_noise(monkeypatch):
    """Jittered places are those recorded; and dense attention, which all sets at once make, is."""
    golden = load("ssa_windows")
    ratio, sigma = 32 // int(golden["window"]), float(golden["sigma"])
    for noise, permutation in zip(golden["noise"], golden["perm_local"], strict=True):
        monkeypatch.setattr(jax.random, "normal", lambda key, shape, noise=noise: jnp.asarray(noise, jnp.float32))
        sets = ops.subsets(jax.random.key(0), 32, ratio=ratio, sigma=sigma)
        np.testing.assert_array_equal(sets, np.sort(permutation.reshape(ratio, -1), axis=1))
    q, k, v = (jnp.asarray(golden[n].swapaxes(1, 2), jnp.float32) for n in "qkv")
    for name, causal in (("dense_bidir", False), ("dense_causal", True)):
        o = ops.softmax_attention(q, k, v, causal=causal)
        np.testing.assert_allclose(o, golden[name].swapaxes(1, 2), atol=1e-5)


@recorded
def test_near_tokens_share_a_window_as_often_as_recorded():
    golden = load("ssa_windows")
    N, w, sigma = 32, int(golden["window"]), float(golden["sigma"])
    draw = partial(ops.subsets, length=N, ratio=N // w, sigma=sigma)
    sets = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 2000)))
    window = np.argsort(sets.reshape(-1, N), axis=1) // w
    together = [np.mean(window[:, d:] == window[:, : N - d]) for d in range(N)]
    np.testing.assert_allclose(together, golden["pair_prob_by_distance_local"], atol=0.02)


ONCE = [(causal, mode) for mode, causal in zip(SUBSETS, (True, False, True, True), strict=True)]


@pytest.mark.parametrize("causal, mode", by_default(ONCE, product([True, False], SUBSETS)))
def test_any_subset_is_a_mask(mode, causal):
    """Values and gradients, of packed documents; a causal token always sees itself."""
    T, ids = 24, np.repeat([0, 1, 2], [5, 12, 7])
    with jax.enable_x64(True):
        sets = ops.subsets(jax.random.key(1), T, ratio=4, mode=mode, sigma=3.0)
        assert sets.shape == ((1, 6) if mode == "truncate" else (4, 6))
        mask = mask_of(sets, mode, T)
        mask = ((mask & np.tri(T, dtype=bool)) | np.eye(T, dtype=bool)) if causal else mask
        mask &= ids[:, None] == ids[None]
        segments = jnp.asarray(ids)[None].repeat(2, axis=0)
        attend = lambda *qkv: ops.subsampled_attention(
            *qkv, sets, queries_too=mode in BY_TOKENS, causal=causal, segment_ids=segments
        )

        def plain(q, k, v):
            logits = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(6)
            seen = jnp.asarray(mask)[None, None]
            weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1), 0)
            return jnp.einsum("bhts,bshv->bthv", weights, v)

        both = lambda f: jax.jit(lambda *qkv: jax.vjp(f, *qkv)[1](jnp.sin(qkv[0])))(*tensors(T))
        assert_close(jax.jit(attend)(*tensors(T)), plain(*tensors(T)), "float64")
        assert_close(both(attend), both(plain), 1e-11)


def test_limits_of_the_jitter():
    key = jax.random.key(0)
    np.testing.assert_array_equal(ops.subsets(key, 12, ratio=3, sigma=0.0), np.arange(12).reshape(3, 4))
    wide = [ops.subsets(jax.random.key(n), 64, ratio=8, sigma=1e4) for n in range(30)]
    assert abs(np.mean([np.ptp(s, axis=1).mean() for s in map(np.asarray, wide)]) - 65 * 7 / 9) < 3
    for mode in SUBSETS[1:]:
        whole = ops.subsets(key, 12, ratio=3, mode=mode)
        np.testing.assert_array_equal(np.sort(np.asarray(whole).reshape(-1)), np.arange(12))


def test_a_window_of_everything_is_dense():
    """To the bit: such a set is in order."""
    q, k, v = tensors(16, jnp.float32)
    for mode in BY_TOKENS:
        o = ops.subsampled_attention(q, k, v, ops.subsets(jax.random.key(0), 16, ratio=1, mode=mode))
        np.testing.assert_array_equal(o, ops.softmax_attention(q, k, v))


def multiplications(jaxpr) -> int:
    """Of all matrix products of a program, those in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            total += int(depth * equation.outvars[0].aval.size)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            total += times * multiplications(inner) if hasattr(inner, "eqns") else 0
    return total


@MODES
def test_it_costs_what_it_says(mode):
    """The products of scores and of values; scores of all pairs over the ratio, but for each query's own."""
    B, T, H, K, ratio = 2, 512, 4, 6, 4
    q = jax.ShapeDtypeStruct((B, T, H, K), jnp.float32)
    sets = jax.eval_shape(lambda key: ops.subsets(key, T, ratio=ratio, mode=mode), jax.random.key(0))
    run = lambda q, sets: ops.subsampled_attention(q, q, q, sets, queries_too=mode in BY_TOKENS, impl="parallel")
    counted = multiplications(jax.make_jaxpr(run)(q, sets).jaxpr)
    scores = num_scores(T, ratio=ratio, mode=mode)
    assert counted == 2 * B * H * K * scores
    assert scores == T * T // ratio if mode in BY_TOKENS else T * T // ratio < scores <= 1.5 * T * T // ratio
    assert num_scores(1024, ratio=4) == 262_144


def test_wrong_subsets_are_named():
    key, q = jax.random.key(0), jnp.ones((1, 12, 1, 2))
    for fields, message in (
        (dict(ratio=5), "ratio=5 does not divide the 12 tokens"),
        (dict(ratio=0), "ratio=0"),
        (dict(ratio=3, sigma=-1.0), "sigma=-1.0; subsets takes 0 or more"),
        (dict(ratio=3, mode="swin"), "mode='swin' is unknown; choose one of truncate"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.subsets(key, 12, **fields)
    with pytest.raises(ValueError, match=r"sets has shape .2, 4.; sets of 12 tokens"):
        ops.subsampled_attention(q, q, q, jnp.zeros((2, 4), jnp.int32))


# ---- the mixer ------------------------------------------------------------------------------------------------------


def draw(length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, length, WIDTH)), jnp.float32)


def built(**fields):
    module = SubsampledAttention(WIDTH, num_heads=2, **fields)
    return module, random_params(module, draw(16))


def test_evaluation_is_dense_attention():
    """With the parameters of training, made without a key for subsets; an rng alone changes nothing."""
    _, params = built(subsample=True)
    full, x = Attention(WIDTH, num_heads=2), draw(16)
    module, _ = built()
    expected = jax.jit(full.apply)(params, x)
    for same in (module, built(subsample=True, ratio=1)[0]):
        np.testing.assert_array_equal(jax.jit(same.apply)(params, x, rngs={"subsample": jax.random.key(1)}), expected)


@pytest.mark.parametrize("mode", by_default(("local",), SUBSETS))
def test_training(mode):
    """Another draw, another output; the same key, the same; causal by original positions; packed documents apart."""
    module, params = built(subsample=True, mode=mode, sigma=2.0)
    apply = jax.jit(lambda x, key, ids=None: module.apply(params, x, ids, rngs={"subsample": key}))
    x, key = draw(16), jax.random.key(1)
    np.testing.assert_array_equal(apply(x, key), apply(x, key))
    assert np.abs(apply(x, key) - apply(x, jax.random.key(2))).max() > 1e-3
    depends = np.abs(jax.jacrev(lambda x: apply(x, key)[0].sum(-1))(x)[:, 0]).max(-1)
    t, s = np.indices(depends.shape)
    assert (depends[s > t] == 0).all() and (depends[s == t] > 0).all() and (depends[s < t] > 0).any()
    ids = jnp.asarray(np.arange(16) >= 9, jnp.int32)[None].repeat(2, axis=0)
    changed = apply(x.at[:, :9].set(0), key, ids)
    np.testing.assert_array_equal(changed[:, 9:], apply(x, key, ids)[:, 9:])
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(module.apply(p, x, rngs={"subsample": key}) ** 2)))(params)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def test_rotary_positions_are_those_of_the_sequence():
    """Against the op on keys rotated in place: every token's weights are a subset of the dense ones."""
    module, params = built(subsample=True, sigma=2.0)
    x, sets = draw(16), []
    original = ops.subsets
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "subsets", lambda *args, **fields: sets.append(original(*args, **fields)) or sets[-1])
        y = module.apply(params, x, rngs={"subsample": jax.random.key(1)})
    mask = mask_of(sets[0], "local", 16) & np.tri(16, dtype=bool)
    maps = {name: np.asarray(part["kernel"], np.float64) for name, part in params["params"].items()}
    q, k, v = ((np.asarray(x) @ maps[f"{n}_proj"]).reshape(2, 16, 2, 4) for n in "qkv")
    angle = np.arange(16)[:, None] * 10000.0 ** (-np.arange(0, 4, 2) / 4)
    turned = lambda a: (a[..., :2] + 1j * a[..., 2:]) * np.exp(1j * angle)[None, :, None]
    q, k = (np.concatenate([turned(a).real, turned(a).imag], axis=-1) for a in (q, k))
    assert_close(y, dense(q, k, v, mask).reshape(x.shape) @ maps["out_proj"], "mixer")


def test_what_is_refused():
    module, params = built(subsample=True)
    with pytest.raises(ValueError, match='no rng "subsample"'):
        module.apply(params, draw(16))
    with pytest.raises(ValueError, match="ratio=4 does not divide the 15 tokens"):
        module.apply(params, draw(15), rngs={"subsample": jax.random.key(0)})
    with pytest.raises(NotImplementedError, match=r"SubsampledAttention\(causal=False\) looks ahead: it has no state"):
        SubsampledAttention(WIDTH, causal=False).init_state(1, max_length=4)
    for fields, message in ((dict(ratio=0), "ratio=0"), (dict(sigma=-1.0), "sigma=-1"), (dict(mode="x"), "mode='x'")):
        with pytest.raises(ValueError, match=message):
            built(**fields)
    with pytest.raises(ValueError, match="size=0; self_ensemble takes 1 or more"):
        self_ensemble(lambda key: jnp.zeros(3), jax.random.key(0), 0)


def by_masks(params, x, mask):
    """The mixer without rotary positions, as four matrices and a mask."""
    maps = {name: np.asarray(part["kernel"], np.float64) for name, part in params["params"].items()}
    q, k, v = ((np.asarray(x) @ maps[f"{n}_proj"]).reshape(*x.shape[:2], 2, -1) for n in "qkv")
    return dense(q, k, v, mask).reshape(x.shape) @ maps["out_proj"]


@pytest.mark.parametrize("mode", by_default(("window", "local_source"), SUBSETS))
def test_where_all_is_seen(mode):
    """An encoder: dense, and in training each set to its own, what comes later included; it has no state."""
    fields = dict(causal=False, mode=mode, sigma=2.0, rotary_base=None)
    module, params = built(subsample=True, **fields)
    x, rngs = draw(16), {"subsample": jax.random.key(1)}
    key = module.apply(params, method=lambda m: m.make_rng("subsample"), rngs=rngs)
    mask = mask_of(ops.subsets(key, 16, ratio=4, mode=mode, sigma=2.0), mode, 16)
    assert mask.sum() == 16 * 4 and np.triu(mask, 1).any()
    assert_close(jax.jit(module.apply)(params, x, rngs=rngs), by_masks(params, x, mask), "mixer")
    evaluated = jax.jit(built(**fields)[0].apply)(params, x)
    assert_close(evaluated, by_masks(params, x, np.ones((16, 16), bool)), "mixer")


@pytest.mark.parametrize("mode", by_default(("local",), SUBSETS))
def test_decoding_by_subsets(mode):
    """From a state each token sees its own subset, the same in any parts, of any room; of ratio 1 it is dense."""
    T, ratio = 13, 3
    module, params = built(subsample=True, ratio=ratio, mode=mode, sigma=2.0, rotary_base=None)
    x, rngs = draw(T), {"subsample": jax.random.key(1)}
    key = module.apply(params, method=lambda m: m.make_rng("subsample"), rngs=rngs)
    at, seen = jnp.arange(T, dtype=jnp.int32), partial(ops.subset_seen, ratio=ratio, mode=mode, sigma=2.0)
    mask = np.asarray(jax.jit(jax.vmap(partial(seen, key), (0, None)))(at, at))
    assert (mask <= np.tri(T, dtype=bool)).all() and mask.diagonal().all()
    counts, share = mask.sum(axis=1), np.arange(1, T + 1) / ratio
    own = mode not in BY_TOKENS  # itself besides
    assert (counts >= np.floor(share)).all() and (counts <= np.ceil(share) + own).all()

    @partial(jax.jit, static_argnums=(0, 1))
    def run(module, cuts, x, state):
        parts = []
        for a, b in zip((0, *cuts), (*cuts, T), strict=True):
            y, state = module.apply(params, x[:, a:b], state, method="prefill", rngs=rngs)
            parts.append(y)
        return jnp.concatenate(parts, axis=1)

    expected = by_masks(params, x, mask)
    for cuts, room in (((), 13), ((1, 9, 10), 20)):
        assert_close(run(module, cuts, x, module.init_state(2, max_length=room)), expected, "mixer")
    step = lambda state, x: module.apply(params, x, state, method="step", rngs=rngs)[::-1]
    steps = jax.jit(lambda x: jax.lax.scan(step, module.init_state(2, max_length=T), x)[1])(x.swapaxes(0, 1))
    assert_close(steps.swapaxes(0, 1), expected, "mixer")
    whole = run(module.clone(ratio=1), (5,), x, module.init_state(2, max_length=T))
    assert_close(whole, by_masks(params, x, np.tri(T, dtype=bool)), "mixer")
    # Packed: of the subset, what is of its own document.
    ids, start = jnp.asarray(np.arange(T) >= 6, jnp.int32)[None].repeat(2, axis=0), module.init_state(2, max_length=T)
    prefill = jax.jit(lambda x, ids: module.apply(params, x, start, ids, method="prefill", rngs=rngs)[0])
    packed = prefill(x, ids)
    same = np.asarray(ids[0])[:, None] == np.asarray(ids[0])
    assert_close(packed, by_masks(params, x, mask & same), "mixer")


@MODES
def test_the_last_token_sees_what_it_does_in_training(mode):
    """By lag, as often as under the sets drawn for as many tokens."""
    T, ratio, draws = 24, 4, jax.random.split(jax.random.key(0), 4000)
    at, fields = jnp.arange(T, dtype=jnp.int32), dict(ratio=ratio, mode=mode, sigma=4.0)
    decoded = jax.jit(jax.vmap(lambda key: ops.subset_seen(key, at[-1], at, **fields)))(draws)
    sets = np.asarray(jax.jit(jax.vmap(partial(ops.subsets, length=T, **fields)))(draws))
    trained = np.stack([mask_of(own, mode, T)[-1] for own in sets]) | (np.arange(T) == T - 1)
    np.testing.assert_allclose(np.mean(np.asarray(decoded), axis=0), trained.mean(0), atol=0.04)


class Drawn(nn.Module):
    """A mixer that hands out what it draws."""

    d_model: int
    dtype: Any = None
    param_dtype: Any = None

    @nn.compact
    def __call__(self, x, segment_ids=None):
        self.sow("losses", "drawn", jax.random.uniform(self.make_rng("subsample")))
        return x


def test_layers_draw_their_own_subsets():
    """In a scan over depth, with the parameters of the dense model."""
    rngs = {"subsample": jax.random.key(1)}
    made = jax.jit(Stack(WIDTH, (Drawn,) * 3, mlp=None).init_with_output)
    _, drawn = made(rngs | {"params": jax.random.key(0)}, draw(4))
    assert len(set(np.asarray(jax.tree.leaves(drawn["losses"])[0]).tolist())) == 3

    slots = lambda **fields: (partial(SubsampledAttention, num_heads=2, ratio=2, **fields),) * 3
    model, training = LanguageModel(5, WIDTH, slots()), LanguageModel(5, WIDTH, slots(subsample=True))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 16)), jnp.int32)
    params = random_params(model, tokens)
    logits = jax.jit(lambda key: training.apply(params, tokens, rngs={"subsample": key}))
    assert np.abs(logits(jax.random.key(1)) - logits(jax.random.key(2))).max() > 0


def test_an_ensemble_averages_probabilities():
    """Not logits; of one member it is that member."""
    logits = lambda key: 3 * jax.random.normal(key, (4, 7))
    key = jax.random.key(0)
    each = np.stack([logits(k) for k in jax.random.split(key, 5)]).astype(np.float64)
    chances = np.exp(each) / np.exp(each).sum(-1, keepdims=True)
    ensemble = jax.jit(lambda key: self_ensemble(logits, key, 5))(key)
    np.testing.assert_allclose(np.exp(np.asarray(ensemble)), chances.mean(0), rtol=1e-5)
    alone = self_ensemble(logits, key, 1)
    np.testing.assert_allclose(alone, jax.nn.log_softmax(logits(jax.random.split(key, 1)[0])), rtol=1e-6)
