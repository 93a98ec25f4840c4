"""Local and sparse attention against dense attention under masks that are written down here, in NumPy."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import WIDTH, assert_close, random_params
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from recorded import load, recorded
from sampled import by_default

from jaxseq import Attention, LanguageModel, Mamba, ops
from jaxseq.analysis import state_bytes
from jaxseq.mixers import BigBird, Longformer, SlidingWindowAttention
from jaxseq.models import ModelConfig
from jaxseq.models.mixed_spans import (
    attention_cost,
    bottom,
    cached_tokens,
    every,
    middle,
    mixed_spans,
    rearranged,
    top,
    visible_pairs,
)

LENGTHS = (1, 7, 12, 29)  # no block divides them all
IDS = np.repeat([3, 1, 3], [6, 4, 19])[None].repeat(2, axis=0)


def dense(q, k, v, mask):
    """Softmax attention of `B T H K` arrays under a mask that broadcasts to `B H T S`."""
    logits = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.where(mask, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bhts,bshv->bthv", weights, v)


def tensors(length, dtype=np.float64):
    rng = np.random.default_rng(length)
    return [rng.standard_normal((2, length, 4, 6)).astype(dtype) for _ in range(3)]


def inputs(length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, length, WIDTH)), jnp.float32)


def by_mask(module, params, x, mask):
    """The module without rotary positions, as four matrices and a mask."""
    maps = {name: np.asarray(part["kernel"], np.float64) for name, part in params["params"].items()}
    q, k, v = ((np.asarray(x) @ maps[f"{n}_proj"]).reshape(*x.shape[:2], module.num_heads, -1) for n in "qkv")
    return dense(q, k, v, mask).reshape(x.shape) @ maps["out_proj"]


def in_parts(module, params, x, state):
    """Four prefills, and a single call."""
    outputs = []
    for a, b in ((0, 4), (4, 5), (5, 17), (17, 29)):
        y, state = module.apply(params, x[:, a:b], state, method="prefill")
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), module.apply(params, x)


def pairs(length):
    return np.indices((length, length))


def in_segments(ids):
    """Same document, and the positions of tokens in theirs: `B T S`, `B T`."""
    restarts = np.cumsum(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1)
    place = np.stack([[t - np.argmax(row == row[t]) for t in range(len(row))] for row in restarts])
    return restarts[:, :, None] == restarts[:, None], place


# ---- the op ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", by_default((1, 29), LENGTHS))
def test_lists_of_keys(length):
    """Random lists, with keys that come twice and keys that are none: values and gradients of dense attention."""
    rng, size = np.random.default_rng(0), 4
    with jax.enable_x64(True):
        lists = rng.integers(-3, length + 3, (-(-length // size), 9))
        i, j = pairs(length)
        mask = np.asarray([[c in lists[t // size] for c in range(length)] for t in range(length)]) & (j <= i)
        same, _ = in_segments(IDS[:, :length])
        attend = lambda q, k, v: ops.block_sparse_attention(
            q, k, v, lists, lambda i, j: j <= i, block_size=size, segment_ids=np.cumsum(
                np.diff(IDS[:, :length], axis=1, prepend=3) != 0, axis=1
            ), chunk_size=8
        )  # fmt: skip

        def plain(q, k, v):
            logits = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(6)
            seen = jnp.asarray((mask & same)[:, None])
            weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
            return jnp.einsum("bhts,bshv->bthv", jnp.where(seen, weights, 0), v)

        q, k, v = map(jnp.asarray, tensors(length))
        both = jax.jit(lambda f, *a: jax.vjp(f, *a)[1](jnp.cos(a[0])), static_argnums=0)
        assert_close(jax.jit(attend)(q, k, v), dense(q, k, v, (mask & same)[:, None]), "float64")
        assert_close(both(attend, q, k, v), both(plain, q, k, v), 1e-11)


def test_lists_cost_what_they_hold():
    """Products of T M pairs, and temporary memory that does not hold them all at once."""
    T, size = 4096, 64
    near = np.arange(0, T, size)[:, None] + np.arange(-size, size)[None]
    run = jax.jit(partial(ops.block_sparse_attention, block_size=size))
    shape = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)
    compiled = run.lower(shape, shape, shape, near.astype(np.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * 2 * size * 4


def test_wrong_lists_are_named():
    q = jnp.ones((1, 5, 2, 2))
    with pytest.raises(ValueError, match="keys has 1 lists and block_size=4; 5 queries"):
        ops.block_sparse_attention(q, q, q, np.zeros((1, 3), np.int32), block_size=4)
    with pytest.raises(ValueError, match="key has 3 heads"):
        wrong = jnp.ones((1, 5, 3, 2))
        ops.block_sparse_attention(q, wrong, wrong, np.zeros((2, 3), np.int32), block_size=4)
    with pytest.raises(ValueError, match="look_back=-1"):
        ops.softmax_attention(q, q, q, look_back=-1)


# ---- spans ----------------------------------------------------------------------------------------------------------

SPANS = {
    "window": (dict(window=4), lambda i, j, place: i - j < 4),
    "block_own": (dict(block_size=5), lambda i, j, place: place[0] // 5 == place[1] // 5),
    "block_prev": (dict(block_size=5, look_back=1), lambda i, j, place: place[0] // 5 - place[1] // 5 <= 1),
    "two blocks back": (dict(block_size=3, look_back=2), lambda i, j, place: place[0] // 3 - place[1] // 3 <= 2),
}


ONCE = [(False, "block_prev"), (True, "two blocks back")]


@pytest.mark.parametrize("packed, name", by_default(ONCE, product([False, True], SPANS)))
def test_spans_are_masks(name, packed):
    """In one call, in parts and token by token, through several turns of the ring; documents start blocks anew."""
    fields, rule = SPANS[name]
    module = Attention(WIDTH, num_heads=2, rotary_base=None, **fields)
    params, x = random_params(module, inputs(1)), inputs(29)
    ids = IDS if packed else np.zeros_like(IDS)
    same, place = in_segments(ids)
    i, j = pairs(29)
    mask = same & (j <= i) & rule(i, j, (place[:, :, None], place[:, None]))
    expected = by_mask(module, params, x, mask[:, None])
    ids = jnp.asarray(ids) if packed else None
    assert_close(jax.jit(module.apply)(params, x, ids), expected, "float32")

    @partial(jax.jit, static_argnums=2)
    def cut(params, x, cuts):
        state, outputs = module.init_state(2), []
        for a, b in zip((0, *cuts), (*cuts, 29), strict=True):
            part = None if ids is None else ids[:, a:b]
            y, state = module.apply(params, x[:, a:b], state, part, method="prefill")
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1)

    # A change of document is told inside of a call, so cuts are within documents.
    for cuts in ((5, 15, 16), (13, 14)):
        assert_close(cut(params, x, cuts), expected, "float32")
    if not packed:
        step = lambda state, x: module.apply(params, x, state, method="step")[::-1]
        steps = jax.jit(lambda x: jax.lax.scan(step, module.init_state(2), x)[1])(x.swapaxes(0, 1))
        assert_close(steps.swapaxes(0, 1), expected, "float32")
    assert module.init_state(1, max_length=99).key.shape[1] == module._span() - 1


@pytest.mark.parametrize("name", by_default(["block_prev"], ["block_own", "block_prev"]))
def test_blocks_over_devices(name):
    """Time split over four devices, with a document that starts on the second and goes on to the last."""
    module = Attention(WIDTH, num_heads=2, **SPANS[name][0])
    params, x = random_params(module, inputs(1)), inputs(32)
    ids = jnp.asarray(np.arange(32) >= 11, jnp.int32)[None].repeat(2, axis=0)
    mesh = jax.make_mesh((4,), ("sequence",), axis_types=(AxisType.Auto,))
    time = P(None, "sequence")
    for more in ((), (ids,)):
        split = jax.shard_map(module.apply, mesh=mesh, in_specs=(P(), time, time)[: 2 + len(more)], out_specs=time)
        assert_close(jax.jit(split)(params, x, *more), jax.jit(module.apply)(params, x, *more), "mixer")


@pytest.mark.parametrize("impl", by_default(["chunked"], ["sequential", "parallel", "chunked"]))
def test_every_form_looks_back(impl):
    module = lambda impl: Attention(WIDTH, num_heads=2, block_size=5, look_back=1, impl=impl)
    params = random_params(module(None), inputs(1))
    gradients = lambda impl: jax.jit(jax.grad(lambda p: jnp.sum(module(impl).apply(p, inputs(29)) ** 2)))(params)
    assert_close(gradients(impl), gradients("parallel"), "mixer")


def test_sliding_window_attention():
    """The name, on its own and on the command line."""
    module = SlidingWindowAttention(WIDTH, num_heads=2, window=4)
    assert module == Attention(WIDTH, num_heads=2, window=4)
    (slot,) = ModelConfig(mixers="slidingwindowattention", depth=1).slots()
    assert slot(d_model=8) == Attention(8, num_heads=2, window=256)


WRONG = {
    "block": (Attention(WIDTH, block_size=0), "block_size=0 and window=None; Attention takes blocks of 1"),
    "both": (Attention(WIDTH, block_size=4, window=4), "block_size=4 and window=4; .* or a window"),
    "look back": (Attention(WIDTH, look_back=1), "look_back=1 and block_size=None"),
    "window": (SlidingWindowAttention(WIDTH, window=0), "window=0"),
    "longformer window": (Longformer(WIDTH, window=0), "window=0; Longformer takes 1 or more"),
    "longformer heads": (Longformer(WIDTH, num_heads=3), "num_heads=3 does not divide d_model=8"),
    "dilations": (Longformer(WIDTH, dilation=(1, 2)), r"dilation=\(1, 2\); Longformer takes 1 or more, or 4"),
    "dilation": (Longformer(WIDTH, dilation=0), "dilation=0; Longformer takes 1 or more"),
    "global": (Longformer(WIDTH, global_tokens=(9,), causal=False), r"global_tokens=\(9,\); a sequence of 9 tokens"),
    "global twice": (Longformer(WIDTH, global_tokens=(3, 3), causal=False), r"global_tokens=\(3, 3\) holds a token"),
    "global causal": (Longformer(WIDTH, global_tokens=(0,)), r"global_tokens=\(0,\) see ahead"),
    "bird block": (BigBird(WIDTH, block_size=0), "block_size=0; BigBird takes 1 or more"),
    "bird window": (BigBird(WIDTH, num_window_blocks=2), "num_window_blocks=2; BigBird takes an odd number"),
    "bird random": (BigBird(WIDTH, num_random_blocks=-1), "num_random_blocks=-1; BigBird takes 0 or more"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fields_are_named(name):
    module, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), inputs(9))


# ---- MASFormer ------------------------------------------------------------------------------------------------------


def test_schedules():
    which = lambda schedule, of=8: schedule(of)
    assert which(bottom(3)) == (0, 1, 2) and which(top(3)) == (5, 6, 7)
    assert which(middle(2)) == (3, 4) and which(middle(3)) == (2, 3, 4)
    assert which(every(4)) == (3, 7) and which(every(3)) == (2, 5)
    full, local = Attention, partial(Mamba, state_size=4)
    assert mixed_spans(full, local, every(2), num_layers=4) == (local, full, local, full)
    assert mixed_spans(full, local, (0,), num_layers=2) == (full, local)
    with pytest.raises(ValueError, match=r"layers=\(0, 4\); take each once, of 0 to 3"):
        mixed_spans(full, local, (0, 4), num_layers=4)
    with pytest.raises(ValueError, match=r"layers=\(1, 1\)"):
        mixed_spans(full, local, (1, 1), num_layers=4)
    with pytest.raises(ValueError, match="5 full layers of 4"):
        mixed_spans(full, local, top(5), num_layers=4)
    with pytest.raises(ValueError, match="period=0"):
        every(0)


@pytest.mark.parametrize("num_full, own, before", [(4, 0.271, 0.479), (8, 0.417, 0.583), (12, 0.563, 0.688)])
def test_the_sheet_s_costs(num_full, own, before):
    cost = partial(attention_cost, 8192, num_layers=24, num_full=num_full, span=1024)
    assert cost(local="block_own") == pytest.approx(own, abs=6e-4)
    assert cost(local="block_prev") == pytest.approx(before, abs=6e-4)
    share = num_full / 24
    assert cost(local="window") == pytest.approx(share + (1 - share) * 0.25)


@pytest.mark.parametrize("local, rule", [("block_own", 0), ("block_prev", 1), ("window", None)])
def test_costs_are_counted_pairs(local, rule):
    """Pairs under the masks, half of the diagonal each, but for what the start of the sequence does not see."""
    n, span = 1024, 16
    i, j = pairs(n)
    seen = (j <= i) & ((i - j <= span) if rule is None else (i // span - j // span <= rule))
    counted = (seen.sum() - n / 2) / (n * n / 2)
    formula = attention_cost(n, num_layers=1, num_full=0, local=local, span=span)
    assert counted == pytest.approx(formula, abs=0 if local == "block_own" else 2 * (span / n) ** 2 + 1 / n)
    for length in (n, n - 5, 5, 1):
        assert visible_pairs(length, local=local, span=span) == seen[:length, :length].sum()
        assert visible_pairs(length) == (j <= i)[:length, :length].sum()
    for bad, message in (({"local": "ring"}, "local='ring'"), ({"span": 0}, "span=0"), ({"num_full": 2}, "2 full")):
        with pytest.raises(ValueError, match=message):
            attention_cost(n, **{"num_layers": 1, "num_full": 0, "local": local, "span": span} | bad)


def test_caches_are_as_large_as_said():
    """A local layer's cache does without the token at hand, which the formula counts."""
    n, b, depth = 64, 8, 4
    of = lambda **fields: partial(Attention, num_heads=2, **fields)
    for local, fields in (("block_own", {"block_size": b}), ("block_prev", {"block_size": b, "look_back": 1})):
        slots = mixed_spans(of(), of(**fields), top(1), num_layers=depth)
        model = LanguageModel(5, WIDTH, slots)
        token = 2 * WIDTH * 4 + 4  # key and value, and the block's number
        fixed = depth * 4 + (depth - 1) * 4  # positions, and how much of a block is filled
        tokens = cached_tokens(n, num_layers=depth, num_full=1, local=local, span=b)
        assert state_bytes(model, n) == token * (tokens - (depth - 1)) + fixed


def test_parameters_of_full_attention_load_into_any_schedule():
    """And give what they gave, to sequences no longer than a block; to longer ones they do not."""
    full, depth = partial(Attention, num_heads=2), 4
    model = lambda slots: LanguageModel(5, WIDTH, slots, remat=False)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 9)), jnp.int32)
    params = random_params(model((full,) * depth), tokens)
    expected = jax.jit(model((full,) * depth).apply)(params, tokens)
    schedules = {"bottom": bottom(1), "middle": middle(2), "every": every(2), "none": ()}
    for fields, name in (
        ({"block_size": 9}, "bottom"),
        ({"block_size": 9, "look_back": 1}, "every"),
        ({"window": 9}, "middle"),
        ({"block_size": 9}, "none"),
    ):
        slots = mixed_spans(full, partial(full, **fields), schedules[name], num_layers=depth)
        assert_close(jax.jit(model(slots).apply)(rearranged(params, slots), tokens), expected, "mixer")
    slots = mixed_spans(full, partial(full, block_size=8), top(1), num_layers=depth)
    short = jax.jit(model(slots).apply)(rearranged(params, slots), tokens)
    assert_close(short[:, :8], expected[:, :8], "mixer")
    assert np.abs(short[:, 8] - expected[:, 8]).max() > 1e-3
    with pytest.raises(ValueError, match="params are of 4 layers, mixers of 3"):
        rearranged(params, (full,) * 3)
    shared = jax.eval_shape(model((full,) * depth).clone(shared=True).init, jax.random.key(0), tokens)
    with pytest.raises(ValueError, match="params are of shared layers; rearranged takes"):
        rearranged(shared, (full,) * depth)


# ---- Longformer -----------------------------------------------------------------------------------------------------


@recorded
def test_longformer_is_the_authors_window():
    golden = load("efficient_transformers")
    w = int(golden["longformer.w_one_sided"])
    q, k, v = (golden[n].swapaxes(1, 2) for n in "qkv")
    i, j = pairs(q.shape[1])
    expected = golden["longformer.window_out"].swapaxes(1, 2)
    np.testing.assert_allclose(dense(q, k, v, np.abs(i - j) <= w), expected, atol=1e-12)
    with jax.enable_x64(True):
        module = Longformer(16, num_heads=2, window=w, causal=False)
        ids = np.zeros(q.shape[:2], np.int32)
        o = jax.jit(module._windowed, static_argnums=5)(*map(jnp.asarray, (q, k, v, ids, ids)), 1)
    assert_close(o, expected, 1e-12)


@pytest.mark.parametrize(
    "packed, causal, length",
    by_default([(True, True, 29), (False, False, 29)], product([False, True], [True, False], LENGTHS)),
)
def test_longformer_is_a_mask(length, causal, packed):
    """A window, with every second key in one head of two, and global tokens with maps of their own."""
    tokens = () if causal else tuple(t for t in (0, 8) if t < length)
    fields = dict(num_heads=2, window=3, dilation=(1, 2), global_tokens=tokens, causal=causal, rotary_base=None)
    module = Longformer(WIDTH, **fields)
    params, x = random_params(module, inputs(length)), inputs(length)
    ids = IDS[:, :length] if packed else np.zeros((2, length))
    same, _ = in_segments(ids)
    i, j = pairs(length)
    lag, g = i - j, np.isin(np.arange(length), tokens)
    near = np.stack([np.abs(lag) <= 3, (np.abs(lag) <= 6) & (lag % 2 == 0)]) & ((lag >= 0) | (not causal))
    expected = by_mask(module, params, x, (near | g[None, None])[None] & same[:, None])
    if tokens:
        renamed = {n: params["params"][f"{n[0]}_global_proj"] for n in ("q_proj", "k_proj", "v_proj")}
        everywhere = by_mask(module, {"params": params["params"] | renamed}, x, same[:, None])
        expected = np.where(g[None, :, None], everywhere, expected)
    run = jax.jit(module.apply)
    assert_close(run(params, x, jnp.asarray(ids, jnp.int32) if packed else None), expected, "mixer")


def test_longformer_that_sees_all_is_dense():
    x = inputs(13)
    module = Longformer(WIDTH, num_heads=2, window=13)
    params = random_params(module, inputs(1))
    full = Attention(WIDTH, num_heads=2)
    assert_close(jax.jit(module.apply)(params, x), jax.jit(full.apply)(params, x), "mixer")


def test_longformer_in_parts():
    """The cache holds w d tokens; a cut leaves parts of lengths that the dilation does not divide."""
    module = Longformer(WIDTH, num_heads=2, window=2, dilation=(1, 3))
    params, x = random_params(module, inputs(1)), inputs(29)
    assert module.init_state(2).key.shape[1] == 6
    parts, whole = jax.jit(partial(in_parts, module))(params, x, module.init_state(2))
    assert_close(parts, whole, "mixer")


# ---- BigBird --------------------------------------------------------------------------------------------------------


def bird(**fields):
    return BigBird(WIDTH, num_heads=2, block_size=3, num_global_blocks=1, num_random_blocks=2, **fields)


def blocks_seen(module, ids):
    """A set of blocks for each, by the module's own draw of the random ones; what must be there is added here."""
    size, length = module.block_size, len(ids)
    count, starts = -(-length // size), np.arange(length) % size == 0
    ends = [next((s for s in range(t, length) if ids[s] != ids[t]), length) for t in range(length)]
    total = -(-np.asarray(ends)[starts] // size)  # blocks up to the end of the segment that a block starts in
    drawn = module._blocks(jnp.arange(count, dtype=jnp.int32), None if module.causal else jnp.asarray(total))
    seen = []
    for n, row in enumerate(np.asarray(drawn)):
        window = {m for m in range(n - 1, n + 2) if 0 <= m < count and not (module.causal and m > n)}
        first = {0}
        random = [m for m in row[-module.num_random_blocks :] if m >= 0]
        others = set(range(n + 1 if module.causal else total[n])) - window - first
        assert set(random) <= others and len(set(random)) == len(random) == min(len(others), module.num_random_blocks)
        seen.append(set(range(count)) if n == 0 and not module.causal else window | first | set(random))
    return seen


@pytest.mark.parametrize(
    "packed, causal, length",
    by_default([(True, True, 29), (False, False, 29)], product([False, True], [True, False], LENGTHS)),
)
def test_big_bird_is_a_mask(length, causal, packed):
    module = bird(causal=causal, rotary_base=None)
    params, x = random_params(module, inputs(length)), inputs(length)
    ids = IDS[:, :length] if packed else np.zeros((2, length))
    seen = blocks_seen(module, ids[0])
    i, j = pairs(length)
    mask = np.asarray([[c // 3 in seen[t // 3] for c in range(length)] for t in range(length)])
    mask = (mask & ((j <= i) | (not causal)))[None] & in_segments(ids)[0]
    run = jax.jit(module.apply)(params, x, jnp.asarray(ids, jnp.int32) if packed else None)
    assert_close(run, by_mask(module, params, x, mask[:, None]), "mixer")


def test_random_blocks():
    """Others with another seed; the same in a longer sequence; each of the others drawn about as often."""
    n = jnp.arange(40, dtype=jnp.int32)
    rows = [np.asarray(bird(seed=seed)._blocks(n, None)) for seed in range(40)]
    assert (rows[0] != rows[1]).any()
    np.testing.assert_array_equal(rows[0][:20], np.asarray(bird()._blocks(n[:20], None)))
    counts = np.bincount(np.concatenate([row[-1, -2:] for row in rows]), minlength=40)
    assert counts[1:38].sum() == 80 and counts.max() <= 10 and (counts[1:20].sum() - 40) ** 2 < 40


@pytest.mark.parametrize("causal", by_default([False], [True, False]))
def test_big_bird_in_front_of_others_is_alone(causal):
    """What comes behind a sequence adds blocks, and changes none of those that it sees."""
    module = BigBird(WIDTH, num_heads=2, block_size=2, num_window_blocks=1, num_global_blocks=0, causal=causal)
    params, x, run = random_params(module, inputs(1)), inputs(21), jax.jit(module.apply)
    ids = jnp.asarray(np.repeat([0, 1, 2], [11, 5, 5]))[None].repeat(2, axis=0)
    assert_close(run(params, x, ids)[:, :11], run(params, x[:, :11]), "mixer")


def test_big_bird_that_sees_all_is_dense():
    x, full = inputs(13), Attention(WIDTH, num_heads=2)
    module = BigBird(WIDTH, num_heads=2, block_size=2, num_window_blocks=13)
    params = random_params(module, inputs(1))
    assert_close(jax.jit(module.apply)(params, x), jax.jit(full.apply)(params, x), "mixer")


def test_big_bird_in_parts():
    """Runs of queries that start inside a block, and inside of a cache with room to spare."""
    module = bird()
    params, x = random_params(module, inputs(1)), inputs(29)
    parts, whole = jax.jit(partial(in_parts, module))(params, x, module.init_state(2, max_length=40))
    assert_close(parts, whole, "mixer")


# ---- all of them ----------------------------------------------------------------------------------------------------

BUILT = {
    "blocks": partial(Attention, WIDTH, num_heads=2, block_size=4, look_back=1),
    "longformer": partial(Longformer, WIDTH, num_heads=2, window=2, dilation=2),
    "big bird": bird,
    "longformer encoder": partial(Longformer, WIDTH, num_heads=2, window=2, global_tokens=(0,), causal=False),
    "big bird encoder": partial(bird, causal=False),
}


@pytest.mark.parametrize("name", by_default(["longformer", "big bird encoder"], BUILT))
def test_bfloat16_and_causality(name):
    module, half = BUILT[name](), BUILT[name](dtype=jnp.bfloat16)
    params, x = random_params(module, inputs(1)), inputs(13)
    y = jax.jit(half.apply)(params, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert_close(y, jax.jit(module.apply)(params, x), "mixer bfloat16")
    depends = jax.jit(jax.jacrev(lambda x: module.apply(params, x)[0].sum(-1)))(x)[:, 0]
    t, s = pairs(13)
    ahead = np.abs(np.asarray(depends)).max(-1)[s > t]
    assert (ahead > 0).any() if "encoder" in name else (ahead == 0).all()
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(module.apply(p, x) ** 2)))(params)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", ["longformer encoder", "big bird encoder"])
def test_what_looks_ahead_has_no_state(name):
    module, causal = BUILT[name](), BUILT[name.removesuffix(" encoder")]()
    params = random_params(module, inputs(1))
    with pytest.raises(NotImplementedError, match=r"causal=False. looks ahead: it has no state"):
        module.init_state(2)
    with pytest.raises(NotImplementedError, match="has no state"):
        module.apply(params, inputs(1)[:, 0], causal.init_state(2, max_length=4), method="step")
    with pytest.raises(NotImplementedError, match="has no state"):
        kind = {"longformer encoder": Longformer, "big bird encoder": BigBird}[name]
        model = LanguageModel(5, WIDTH, (partial(kind, causal=False),))
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
