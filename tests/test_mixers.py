"""The contract of every causal mixer, over the family table."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CHUNK, FULL_MIXERS, MIXERS, WIDTH, assert_close, initialised, random_params
from flax import nnx, traverse_util
from jax.sharding import PartitionSpec as P
from sampled import by_default

from jaxseq import GLA, S4D, Attention, LanguageModel, Mamba
from jaxseq.mixers import (
    DSS,
    GSA,
    H3,
    HGRN,
    HGRN2,
    KDA,
    LRU,
    MLSTM,
    RGLRU,
    RWKV6,
    RWKV7,
    S4,
    S5,
    Based,
    Comba,
    GatedDeltaNet,
    LightNet,
    LinearAttention,
    Mamba2,
    MinGRU,
    MinLSTM,
    PaTHAttention,
    ReBased,
    RetNet,
    Rodimus,
)

CHEAP = [name for name, member in MIXERS.items() if member.cheap or member.slow]
#: Every mixer once: its other settings are called after the plain one.
PLAIN = [name for name in CHEAP if not any(name.startswith(f"{plain} ") for plain in MIXERS)]
#: What a setting may break in a mixer whose laws hold.
SETTINGS = {name: pytest.param(name, marks=pytest.mark.slow) for name, member in MIXERS.items() if member.cheap}


@pytest.fixture(scope="module")
def built():
    """Module and parameters of a member, made once."""
    kept = {}

    def of(name, **fields):
        known = (name, *fields.items())
        if known not in kept:
            kept[known] = initialised(MIXERS[name], **fields)
        return kept[known]

    return of


def draw(length, seed=0, batch=2):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, length, WIDTH)), jnp.float32)


def in_parts(module, params, x, cuts, segment_ids=None):
    """Prefill part by part, the state in between."""
    state, outputs = module.init_state(x.shape[0], max_length=x.shape[1]), []
    for start, end in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
        ids = None if segment_ids is None else segment_ids[:, start:end]
        y, state = module.apply(params, x[:, start:end], state, ids, method="prefill")
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), state


def by_steps(module, params, x):
    step = lambda state, x: module.apply(params, x, state, method="step")[::-1]
    state, y = jax.lax.scan(step, module.init_state(x.shape[0], max_length=x.shape[1]), x.swapaxes(0, 1))
    return y.swapaxes(0, 1), state


@pytest.mark.parametrize("name", FULL_MIXERS)
def test_call_is_two_parts_is_steps(name, built):
    """Also a part of one token, and a cut inside a chunk."""
    module, params = built(name)

    @jax.jit
    def everything(params, x):
        parts, state = in_parts(module, params, x, (x.shape[1] // 2,) * (x.shape[1] > 1))
        return (module.apply(params, x), state), (parts, state), by_steps(module, params, x)

    for length in (1, 4 * CHUNK + 3):
        whole, *others = everything(params, draw(length))
        for y, state in others:
            assert_close(y, whole[0], "mixer")
            if MIXERS[name].same_state:
                assert_close(state, whole[1], "mixer")
        expected = jax.eval_shape(partial(module.init_state, 2, max_length=length))
        assert jax.tree.map(form, whole[1]) == jax.tree.map(form, expected)


@pytest.mark.parametrize("name", FULL_MIXERS)
def test_no_state_is_the_start(name, built):
    """Also for a cache: what it must hold is known from its window, or it refuses."""
    module, params = built(name)
    x = draw(9)
    first = lambda params: module.apply(params, x[:, :5], None, method="prefill")
    if not MIXERS[name].recurrent and getattr(module, "window", None) is None:
        with pytest.raises(ValueError, match="max_length=None"):
            jax.eval_shape(first, params)
        return

    @jax.jit
    def both(params):
        y, state = first(params)
        rest, _ = module.apply(params, x[:, 5:], state, method="prefill")
        return jnp.concatenate([y, rest], axis=1), module.apply(params, x)

    assert_close(*both(params), "mixer")


def form(x):
    return x.shape, x.dtype


@pytest.mark.parametrize("name", FULL_MIXERS + [p for name, p in SETTINGS.items() if MIXERS[name].gradient])
def test_gradients_flow_through_the_state(name, built):
    """Of all parameters and of the input: the whole sequence and two parts have the same."""
    module, params = built(name)
    weight = draw(2 * CHUNK + 3, seed=1)
    run = {"whole": module.apply, "parts": lambda params, x: in_parts(module, params, x, (CHUNK + 1,))[0]}
    loss = lambda params, x, name: jnp.sum(weight * run[name](params, x))
    both = jax.jit(lambda params, x: [jax.grad(loss, (0, 1))(params, x, name) for name in run])
    whole, parts = both(params, draw(2 * CHUNK + 3))
    assert_close(parts, whole, MIXERS[name].gradient)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(whole))


@pytest.mark.parametrize("name", by_default(PLAIN, CHEAP))
def test_every_setting_steps_as_it_calls(name):
    module, x = MIXERS[name].build(), draw(9)
    params = random_params(module, x)
    both = jax.jit(lambda params, x: (module.apply(params, x), by_steps(module, params, x)[0]))
    whole, steps = both(params, x)
    assert_close(steps, whole, "mixer")


# By default of ops of different kinds: their forms are in tests/test_ops.py.
@pytest.mark.parametrize("name", by_default(["S4D", "Attention"], [p.values[0] for p in FULL_MIXERS]))
def test_every_form_is_the_same(name, built):
    """Values and gradients under each `impl` that the mixer's op has."""
    module, params = built(name)
    if not hasattr(module, "impl"):
        pytest.skip("nothing to choose")
    x = draw(2 * CHUNK + 3)
    with pytest.raises(NotImplementedError, match="impl='none' is no form of") as refused:
        jax.eval_shape(MIXERS[name].build(impl="none").apply, params, x)
    forms = re.findall(r"'(\w+)'", str(refused.value).split("choose")[1])
    forms = [form for form in forms if form != "fused"]  # cuDNN's, of half precision: tests/test_fused_attention.py
    assert "sequential" in forms and len(forms) > 1

    def everything(form):
        module = MIXERS[name].build(impl=form)
        values, pull = jax.vjp(module.apply, params, x)
        return values, pull(draw(2 * CHUNK + 3, seed=1))

    expected = jax.jit(partial(everything, "sequential"))()
    for form in forms[1:]:
        values, gradients = jax.jit(partial(everything, form))()
        assert_close(values, expected[0], "mixer")
        assert_close(gradients, expected[1], MIXERS[name].gradient)


@pytest.mark.parametrize("name", FULL_MIXERS + [p for name, p in SETTINGS.items() if MIXERS[name].packs])
def test_packed_is_separate(name, built):
    """Three sequences in a row, also when the cut between two prefills falls inside the second."""
    module, params = built(name)
    x, borders = draw(17), (0, 6, 13, 17)
    ids = jnp.asarray(np.repeat([4, 2, 9], np.diff(borders)))[None].repeat(2, axis=0)

    @jax.jit
    def everything(params, x):
        alone = [module.apply(params, x[:, a:b]) for a, b in zip(borders, borders[1:], strict=False)]
        parts, state = in_parts(module, params, x, (9,), ids)
        last = in_parts(module, params, x[:, borders[-2] :], ())[1]
        return jnp.concatenate(alone, axis=1), module.apply(params, x, ids), parts, state, last

    alone, packed, parts, state, last = everything(params, x)
    assert_close(packed, alone, "mixer")
    assert_close(parts, alone, "mixer")
    if MIXERS[name].reach > 100 and MIXERS[name].recurrent:  # a cache may keep what no query will see again
        assert_close(state, last, "mixer")


@pytest.mark.parametrize("name", FULL_MIXERS)
def test_causal_by_gradient(name, built):
    """dy_t/dx_s is zero to the bit after t, and nowhere zero from t back to as far as the mixer sees."""
    module, params = built(name, **MIXERS[name].exact)
    length = 11
    jacobian = jax.jit(jax.jacrev(lambda x: module.apply(params, x)[0].sum(-1)))(draw(length, batch=1))[:, 0]
    depends = np.abs(np.asarray(jacobian)).max(-1)
    if MIXERS[name].causal_to_rounding:
        depends[depends < 1e-6 * depends.max()] = 0
    t, s = np.indices(depends.shape)
    seen = (s <= t) & (t - s < MIXERS[name].reach)
    np.testing.assert_array_equal(depends[~seen], 0)
    assert (depends[seen] > 0).all()


@pytest.mark.parametrize("name", FULL_MIXERS)
def test_extreme_gates_are_finite(name, built):
    """Gates that forget all at once, and logits in the thousands: no NaN in values or gradients."""
    module, params = built(name)
    flat = traverse_util.flatten_dict(params["params"], sep="/")
    assert MIXERS[name].extreme.keys() <= flat.keys()
    flat |= {path: jnp.full_like(flat[path], level) for path, level in MIXERS[name].extreme.items()}
    loss = lambda params, x: jnp.sum(jnp.sin(module.apply(params, x)))
    extreme = {"params": traverse_util.unflatten_dict(flat, sep="/")}
    leaves = jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1)))(extreme, draw(11)))
    assert all(np.isfinite(x).all() for x in leaves)


@pytest.mark.parametrize("name", FULL_MIXERS)
def test_bfloat16(name, built):
    """bfloat16 in, bfloat16 out, states in float32 and never wider; near the same parameters in float32."""
    (module, params), x = built(name), draw(13)
    half = MIXERS[name].build(dtype=jnp.bfloat16)
    assert jax.eval_shape(module.apply, params, x).dtype == jnp.float32
    with jax.numpy_dtype_promotion("standard"):  # flax's own norms promote
        y, state = jax.jit(lambda p, x: in_parts(half, p, x, (6,)))(params, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert all(s.dtype in (jnp.float32, jnp.complex64, jnp.int32) for s in jax.tree.leaves(state))
    assert_close(y, jax.jit(module.apply)(params, x), "mixer bfloat16")


@pytest.mark.parametrize("name", by_default(["LSTM", "ICLRNN", "RWKV7", "S5"], MIXERS))
def test_parameters_may_be_bfloat16(name):
    """They are drawn, though matrix factors are of wider numbers, and none is another float."""
    module = MIXERS[name].build(param_dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # inputs are float32, and win
        lowered = jax.jit(module.init).lower(jax.random.key(0), jnp.zeros((1, 2, WIDTH)))
    assert {x.dtype for x in jax.tree.leaves(lowered.out_info)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", FULL_MIXERS)
def test_state(name, built):
    """Made without parameters, of a recurrent mixer as large for a million tokens as for one, and free to donate."""
    module, _ = built(name)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(module.init_state(2, max_length=4)) if x.size]
    assert len(set(buffers)) == len(buffers)
    size = lambda length: sum(
        x.size for x in jax.tree.leaves(jax.eval_shape(partial(module.init_state, 3, max_length=length)))
    )
    assert (size(100) == size(1_000_000)) == MIXERS[name].recurrent or MIXERS[name].reach < 100


@pytest.mark.parametrize(
    "name", [pytest.param(*m.values, marks=[pytest.mark.slow] * (m.values != ("GLA",))) for m in FULL_MIXERS]
)
def test_inside_other_things(name, built):
    """`nn.Sequential`, `vmap`, an NNX model, and `shard_map` with the batch over eight devices."""
    module, params = built(name)
    x = draw(5, batch=8)
    expected = jax.jit(module.apply)(params, x)
    assert_close(jax.jit(jax.vmap(lambda x: module.apply(params, x[None])[0]))(x), expected, "mixer")

    stacked = nn.Sequential([nn.Dense(WIDTH), MIXERS[name].build()])
    held = {"layers_0": {"kernel": jnp.eye(WIDTH), "bias": jnp.zeros(WIDTH)}, "layers_1": params["params"]}
    assert_close(jax.jit(stacked.apply)({"params": held}, x), expected, "mixer")

    def bridged(x):
        whole = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(x)
        return whole(x), nnx.state(whole, nnx.Param)

    y, state = nnx.eval_shape(bridged, x)  # it runs in the README
    assert y.shape == expected.shape
    assert sum(p.size for p in jax.tree.leaves(state)) == sum(p.size for p in jax.tree.leaves(params))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        lambda params, x: in_parts(module, params, x, (3,))[0],
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P("data"),
    )
    assert_close(jax.jit(split)(params, x), expected, "mixer")
    gradients = lambda params: [jax.grad(lambda p, f=f: jnp.sum(f(p, x) ** 2))(params) for f in (split, module.apply)]
    assert_close(*jax.jit(gradients)(params), MIXERS[name].gradient)


WRONG = {
    "gla heads": (GLA(WIDTH, num_heads=3), "num_heads=3 does not divide d_model=8; choose one of 1, 2, 4, 8"),
    "gla no heads": (GLA(WIDTH, num_heads=0), "num_heads=0 does not divide d_model=8"),
    "gla kv heads": (GLA(WIDTH, num_heads=4, num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=4"),
    "gla width": (GLA(WIDTH, num_heads=8), "expand_k=0.5 gives 0.5 channels a head"),
    "attention heads": (Attention(WIDTH, num_heads=5), "num_heads=5 does not divide d_model=8"),
    "attention kv heads": (Attention(WIDTH, num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=4"),
    "attention odd width": (Attention(WIDTH, num_heads=8), "head width 1; rotary takes an even one"),
    "odd state": (S4D(WIDTH, state_size=5), "state_size=5; S4D takes an even number"),
    "no state": (S4D(WIDTH, state_size=0), "state_size=0"),
    "unknown start": (
        S4D(WIDTH, initialisation="hippo"),
        "initialisation='hippo' is unknown to S4D; choose one of legs",
    ),
    "unknown rule": (S4D(WIDTH, discretisation="euler"), "discretisation='euler' is unknown.*zoh, bilinear"),
    "unknown map": (S4D(WIDTH, real_map="square"), "real_map='square' is unknown"),
    "copies": (S4D(WIDTH, num_copies=3), "num_copies=3 does not divide d_model=8"),
    "step sizes": (S4D(WIDTH, dt_min=0.1, dt_max=0.01), "dt_min=0.1 and dt_max=0.01"),
    "no rate": (S4D(WIDTH, rate=0.0), "rate=0.0"),
    "gla window": (GLA(WIDTH, conv_window=-1), "conv_window=-1; GLA takes 1 or more"),
    "gla no kv heads": (GLA(WIDTH, num_kv_heads=-1), "num_kv_heads=-1 does not divide"),
    "retnet base": (RetNet(WIDTH, rotary_base=0.0), "rotary_base=0.0; RetNet takes a number above 0"),
    "retnet odd width": (RetNet(WIDTH, num_heads=8), "head width 1; rotary takes an even one"),
    "hgrn bound": (
        HGRN(WIDTH, lower_bound=1.0),
        "lower_bound=1.0; take one number or 8 of them, 0 or more and below 1",
    ),
    "hgrn2 bounds": (HGRN2(WIDTH, lower_bound=(0.5, 0.1)), r"lower_bound=\(0.5, 0.1\); take one number or 8"),
    "hgrn2 heads": (HGRN2(WIDTH, num_heads=3), "num_heads=3 does not divide d_model=8"),
    "unknown features": (
        LinearAttention(WIDTH, feature_map="exp"),
        "feature_map='exp' is unknown to LinearAttention; choose one of elu, .*hedgehog, or a function",
    ),
    "linear attention heads": (LinearAttention(WIDTH, num_heads=3), "num_heads=3 does not divide d_model=8"),
    "based width": (Based(WIDTH, feature_width=0), "feature_width=0; Based takes 1 or more"),
    "rebased width": (ReBased(WIDTH, feature_width=1), "feature_width=1; ReBased takes 2 or more"),
    "gla temperature": (GLA(WIDTH, gate_temperature=-1.0), "gate_temperature=-1.0; GLA takes a number above 0"),
    "gla bound": (GLA(WIDTH, min_log_decay=1.0), "min_log_decay=1.0; GLA takes a number below 0, or None"),
    "gla rank": (GLA(WIDTH, gate_rank=0), "gate_rank=0; GLA takes 1 or more"),
    "gsa temperature": (GSA(WIDTH, gate_temperature=0.0), "gate_temperature=0.0; GSA takes a number above 0"),
    "kda bound": (KDA(WIDTH, min_log_decay=0.5), "min_log_decay=0.5; KDA takes a number below 0, or None"),
    "rwkv6 rank": (RWKV6(WIDTH, mix_rank=0), "mix_rank=0; RWKV6 takes 1 or more"),
    "rwkv7 rank": (RWKV7(WIDTH, a_rank=0), "a_rank=0; RWKV7 takes 1 or more"),
    "no key heads": (Attention(WIDTH, num_kv_heads=0), "num_kv_heads=0 does not divide num_heads=4"),
    "no value heads": (
        GatedDeltaNet(WIDTH, num_heads=2, num_value_heads=0),
        "num_value_heads=0 does not divide d_model=8",
    ),
    "path rank": (PaTHAttention(WIDTH, rank=0), "rank=0; PaTHAttention takes 1 or more"),
    "path window": (PaTHAttention(WIDTH, conv_window=0), "conv_window=0; PaTHAttention takes 1 or more"),
    "gla gate": (
        GLA(WIDTH, gate="matrix"),
        "gate='matrix' is unknown to GLA; choose one of vector, scalar, fixed, none",
    ),
    "mamba window": (Mamba(WIDTH, conv_window=0), "conv_window=0; Mamba takes 1 or more"),
    "rglru heads": (RGLRU(WIDTH, num_heads=0), "num_heads=0; RGLRU takes 1 or more"),
    "rglru width": (RGLRU(WIDTH, num_heads=3, width=10), "width=10 is no multiple of num_heads=3"),
    "rglru window": (RGLRU(WIDTH, conv_window=0), "conv_window=0; RGLRU takes 1 or more"),
    "rglru decays": (RGLRU(WIDTH, decay_max=1.0), "decay_min=0.9 and decay_max=1.0"),
    "min gru width": (MinGRU(WIDTH, expand=0), "expand=0; MinGRU takes 1 or more"),
    "min lstm width": (MinLSTM(WIDTH, expand=0), "expand=0; MinLSTM takes 1 or more"),
    "householders": (GatedDeltaNet(WIDTH, num_householders=0), "num_householders=0; GatedDeltaNet takes 1 or more"),
    "lightnet rank": (LightNet(WIDTH, gate_rank=0), "gate_rank=0; LightNet takes 1 or more"),
    "comba heads": (Comba(WIDTH, num_heads=3), "num_heads=3 does not divide d_model=8"),
    "rodimus keys": (Rodimus(WIDTH, key_width=0), "key_width=0; Rodimus takes 1 or more"),
    "no kv heads": (GSA(WIDTH, num_kv_heads=0), "num_kv_heads=0 does not divide num_heads=4"),
    "gsa slots": (GSA(WIDTH, num_slots=0), "num_slots=0; GSA takes 1 or more"),
    "gsa kv heads": (GSA(WIDTH, num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=4"),
    "rwkv6 depth": (RWKV6(WIDTH, layer=3, num_layers=3), "layer=3 of num_layers=3; layers are 0 to"),
    "rwkv7 depth": (RWKV7(WIDTH, layer=-1), "layer=-1 of num_layers=1; layers are 0 to"),
    "rwkv7 heads": (RWKV7(WIDTH, num_heads=3), "num_heads=3 does not divide d_model=8"),
    "mlstm blocks": (MLSTM(WIDTH, qkv_block=3), "qkv_block=3 does not divide the 16 channels inside MLSTM"),
    "mlstm window": (MLSTM(WIDTH, conv_window=0), "conv_window=0; MLSTM takes 1 or more"),
    "mamba step sizes": (Mamba(WIDTH, dt_min=-1.0), "dt_min=-1.0"),
    "mamba2 heads": (Mamba2(WIDTH, num_heads=3), "num_heads=3 does not divide expand·d_model=16"),
    "mamba2 groups": (Mamba2(WIDTH, num_heads=4, num_groups=3), "num_groups=3 does not divide num_heads=4"),
    "mamba2 limits": (Mamba2(WIDTH, num_heads=2, dt_limit=(1.0, 0.1)), r"dt_limit=.1.0, 0.1."),
    "s4 pairs": (S4(WIDTH, state_size=5), "state_size=5; S4 takes an even number"),
    "s4 measure": (S4(WIDTH, measure="lin"), "measure='lin' is unknown to S4; choose one of legs"),
    "s4 copies": (S4(WIDTH, num_copies=3), "num_copies=3 does not divide d_model=8"),
    "s4 rate": (S4(WIDTH, rate=0.0), "rate=0.0; S4 takes a positive"),
    "s4 output": (S4(WIDTH, output="glu"), "output='glu' is unknown to S4"),
    "dss version": (DSS(WIDTH, version="tanh"), "version='tanh' is unknown to DSS"),
    "dss length": (DSS(WIDTH, version="softmax"), "length=None; DSS"),
    "s5 blocks": (S5(WIDTH, state_size=12, num_blocks=4), "state_size=12, num_blocks=4"),
    "s5 steps": (S5(WIDTH, dt_min=0.1, dt_max=0.01), "dt_min=0.1 and dt_max=0.01"),
    "lru ring": (LRU(WIDTH, r_min=0.9, r_max=0.5), "r_min=0.9 and r_max=0.5"),
    "h3 heads": (H3(WIDTH, head_width=3), "head_width=3 does not divide d_model=8"),
    "h3 shift": (H3(WIDTH, shift_size=0), "shift_size=0; H3 takes 1 or more"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fields_are_named(name):
    module, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), draw(3))


@pytest.mark.parametrize("name", FULL_MIXERS)
def test_wrong_inputs_are_named(name, built):
    module, params = built(name)
    apply = lambda *args, **options: jax.eval_shape(partial(module.apply, **options), params, *args)
    with pytest.raises(ValueError, match="x has shape .3, 8."):
        apply(draw(3)[0])
    with pytest.raises(ValueError, match=r"x has width 7; .*d_model=8"):
        apply(draw(3)[..., :7])
    with pytest.raises(TypeError, match="x has shape .* and dtype int32"):
        apply(draw(3).astype(jnp.int32))
    with pytest.raises(ValueError, match="segment_ids has shape .2, 2."):
        apply(draw(3), jnp.zeros((2, 2), jnp.int32))
    with pytest.raises(ValueError, match="x has shape .2, 1, 8."):
        apply(draw(1), module.init_state(2, max_length=4), method="step")
    if hasattr(module, "impl"):
        with pytest.raises(NotImplementedError, match="impl='fast'"):
            jax.eval_shape(MIXERS[name].build(impl="fast").apply, params, draw(3))


@pytest.mark.parametrize("kind", by_default([S4D], [S4, S4D, DSS, S5]))
def test_both_directions(kind):
    """Every output sees every input, segments stay apart, and there is no state; nor a language model."""
    module = kind(WIDTH, state_size=4, bidirectional=True)
    x = draw(9)
    params = random_params(module, x)
    apply = jax.jit(module.apply)
    reached = jax.jit(jax.jacobian(lambda x: module.apply(params, x)[0, :, 0]))(x)[:, 0]
    assert (np.abs(reached).sum(-1) > 0).all()
    ids = jnp.asarray([0] * 4 + [1] * 5)[None].repeat(2, axis=0)
    alone = jnp.concatenate([apply(params, x[:, :4]), apply(params, x[:, 4:])], axis=1)
    assert_close(apply(params, x, ids), alone, "mixer")
    with pytest.raises(NotImplementedError, match=r"bidirectional=True. looks ahead: it has no state"):
        module.init_state(2)
    with pytest.raises(NotImplementedError, match="has no state"):
        causal = kind(WIDTH, state_size=4)
        jax.eval_shape(partial(module.apply, method="prefill"), params, x, causal.init_state(2))
    with pytest.raises(NotImplementedError, match="has no state"):
        model = LanguageModel(5, WIDTH, (partial(kind, state_size=4, bidirectional=True),))
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))


GROUPED = [GLA, GSA, RetNet, LinearAttention, Attention, PaTHAttention]


@pytest.mark.parametrize("kind", by_default([GLA, Attention, PaTHAttention], GROUPED))
def test_keys_that_heads_share(kind):
    """Fewer heads of keys and values are as many as of queries, written several times."""
    x, grouped, full = draw(9), kind(WIDTH, num_heads=4, num_kv_heads=2), kind(WIDTH, num_heads=4)
    params = random_params(grouped, x)

    def repeated(leaf, wanted):
        if leaf.shape == wanted.shape:
            return leaf
        return jnp.repeat(leaf.reshape(*leaf.shape[:-1], 2, -1), 2, axis=-2).reshape(wanted.shape)

    wanted = jax.eval_shape(full.init, jax.random.key(0), x)
    assert wanted != jax.eval_shape(lambda: params)
    same = jax.tree.map(repeated, params, wanted)
    assert_close(jax.jit(grouped.apply)(params, x), jax.jit(full.apply)(same, x), "mixer")


def test_a_cache_needs_its_length():
    with pytest.raises(ValueError, match="max_length=None; Attention without a window"):
        Attention(WIDTH).init_state(1)
    with pytest.raises(ValueError, match="max_length=-1"):
        Attention(WIDTH).init_state(1, max_length=-1)
