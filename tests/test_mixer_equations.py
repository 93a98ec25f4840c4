"""Independent truth: mixers that nobody recorded, against NumPy loops written from their papers' equations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, cast, random_params
from sampled import by_default

from jaxseq.layers.decays import lightning_log_decays
from jaxseq.mixers import (
    ABC,
    GLA,
    GSA,
    H3,
    HGRN,
    HGRN2,
    KDA,
    MLSTM,
    RGLRU,
    RWKV6,
    RWKV7,
    Comba,
    DeltaNet,
    ForgettingAttention,
    GatedDeltaNet,
    Lightning,
    LogLinearAttention,
    Mamba,
    MesaNet,
    MinGRU,
    MinLSTM,
    PaTHAttention,
)

LENGTH, WIDTH = 15, 6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def convolved(p, x, starts):
    """A window of four tokens that no restart lies in."""
    y = np.zeros_like(x)
    for t in range(len(x)):
        for lag in range(min(4, t - starts[t] + 1)):
            y[t] += p["kernel"][3 - lag] * x[t - lag]
    return y + p.get("bias", 0)


def in_blocks(p, x):
    n, i, _ = p["kernel"].shape
    y = np.concatenate([x[:, b * i : (b + 1) * i] @ p["kernel"][b] for b in range(n)], axis=-1)
    return y + p.get("bias", 0)


def griffin(p, x, starts):
    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    u = convolved(p["conv"], linear(p["in_proj"], x), starts)
    r, i = sigmoid(in_blocks(p["decay_gate"], u)), sigmoid(in_blocks(p["input_gate"], u))
    a = np.exp(-8 * r * softplus(p["Lambda"]))
    h = np.zeros_like(u)
    for t in range(len(x)):
        first = starts[t] == t
        h[t] = i[t] * u[t] if first else a[t] * h[t - 1] + np.sqrt(1 - a[t] ** 2) * i[t] * u[t]
    return linear(p["out_proj"], gelu(linear(p["gate_proj"], x)) * h)


def positive(x):
    return np.where(x >= 0, x + 0.5, sigmoid(x))


def minimal_gru(p, x, starts):
    z, new = sigmoid(linear(p["gate_proj"], x)), positive(linear(p["candidate_proj"], x))
    h = np.zeros_like(new)
    for t in range(len(x)):
        h[t] = z[t] * new[t] + (0 if starts[t] == t else (1 - z[t]) * h[t - 1])
    return linear(p["out_proj"], h)


def minimal_lstm(p, x, starts):
    f, i = sigmoid(linear(p["forget_proj"], x)), sigmoid(linear(p["input_proj"], x))
    new, h = positive(linear(p["candidate_proj"], x)), np.zeros_like(f)
    for t in range(len(x)):
        h[t] = i[t] / (f[t] + i[t]) * new[t] + (0 if starts[t] == t else f[t] / (f[t] + i[t]) * h[t - 1])
    return linear(p["out_proj"], h)


def matrix_lstm(p, x, starts, heads=2, eps=1e-5):
    """Without the running maximum: gates as they are."""
    u, z = linear(p["up_proj"], x), linear(p["gate_proj"], x)
    c = silu(convolved(p["conv"], u, starts))
    q, k, v = (in_blocks(p[f"{n}_proj"], a) for n, a in (("q", c), ("k", c), ("v", u)))
    qkv = np.concatenate([q, k, v], axis=-1)
    f, i = sigmoid(linear(p["forget_gate"], qkv)), np.exp(linear(p["input_gate"], qkv))
    K = u.shape[-1] // heads
    h = np.zeros_like(u)
    for head in range(heads):
        own = slice(head * K, (head + 1) * K)
        for t in range(len(x)):
            if starts[t] == t:
                C, n = np.zeros((K, K)), np.zeros(K)
            C = f[t, head] * C + i[t, head] * np.outer(k[t, own], v[t, own])
            n = f[t, head] * n + i[t, head] * k[t, own]
            read = C.T @ q[t, own] / np.sqrt(K) / max(abs(n @ q[t, own]) / np.sqrt(K), 1)
            h[t, own] = (read - read.mean()) / np.sqrt(read.var() + eps)
    return linear(p["out_proj"], (h * p["norm"]["scale"] + p["skip"] * c) * silu(z))


def hungry_hippo(p, x, starts, width=2):
    """Both state spaces as recurrences: one shifts its state by a place, one is diagonal; two products gate them."""
    q, k, v = (linear(p[f"{name}_proj"], x) for name in "qkv")
    s, of_pairs = p["ssm"], lambda pair: pair[..., 0] + 1j * pair[..., 1]
    A = -np.exp(s["A_real"]) - 1j * s["A_imag"]
    decay = np.exp(np.exp(s["log_dt"]) * A)
    B, C = (decay - 1) / A * of_pairs(s["B"]), of_pairs(s["C"])
    y = np.zeros_like(x)
    for t in range(len(x)):
        if starts[t] == t:
            places = np.zeros((4, x.shape[1]))
            states = np.zeros((x.shape[1] // width, width, width, A.shape[1]), complex)
        places = np.concatenate([k[t : t + 1], places[:-1]])
        shifted = np.sum(p["shift"]["kernel"][::-1] * places, axis=0) + p["shift"]["bias"]
        for h, state in enumerate(states):
            own = slice(h * width, (h + 1) * width)
            product = np.outer(shifted[own], v[t, own])
            states[h] = decay[h] * state + B[h] * product[..., None]
            kept = 2 * (states[h] @ C[h]).real + s["D"][h] * product
            y[t, own] = q[t, own] @ kept
    return linear(p["out_proj"], y)


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def rms(p, x, eps=1e-5):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * p["scale"]


def unit(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def of_heads(x, heads=2):
    """`T H·K` → `H T K`."""
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def joined(o):
    return o.swapaxes(0, 1).reshape(o.shape[1], -1)


def minimax(p, x, starts, fraction=0.2):
    q, k, v = (of_heads(silu(linear(p[f"{name}_proj"], x))) for name in "qkv")
    H, _, K = q.shape
    o = np.zeros_like(v)
    for h in range(H):
        for t in range(len(x)):
            S = np.zeros((K, K)) if starts[t] == t else np.exp(-8 * h / H * (1 - fraction)) * S
            S = S + np.outer(k[h, t], v[h, t])
            o[h, t] = S.T @ q[h, t] / np.sqrt(K)
    return linear(p["out_proj"], rms(p["norm"], joined(o)) * sigmoid(linear(p["gate_proj"], x)))


def bounded_memory(p, x, starts):
    """The softmax over time of every slot, written out."""
    q, k, v, w = (of_heads(linear(p[f"{name}_proj"], x)) for name in ("q", "k", "v", "slot"))
    o = np.zeros_like(v)
    for h, t in np.ndindex(*v.shape[:2]):
        seen = slice(starts[t], t + 1)
        phi = np.stack([softmax(column) for column in w[h, seen].T])
        o[h, t] = softmax(phi @ k[h, seen] @ q[h, t] / np.sqrt(q.shape[-1])) @ (phi @ v[h, seen])
    return linear(p["out_proj"], joined(o))


def least_squares(p, x, starts):
    """Solved, where the mixer takes conjugate gradients."""
    q, k = (unit(of_heads(silu(convolved(p[f"{n}_conv"], linear(p[f"{n}_proj"], x), starts)))) for n in "qk")
    v = of_heads(linear(p["v_proj"], x))
    decay, beta = sigmoid(linear(p["decay_proj"], x)), sigmoid(linear(p["beta_proj"], x))
    ridge, o = softplus(p["ridge"]) + 0.25, np.zeros_like(v)
    for h in range(len(q)):
        for t in range(len(x)):
            H, G = (0, 0) if starts[t] == t else (decay[t, h] * H, decay[t, h] * G)
            H = H + beta[t, h] * np.outer(k[h, t], k[h, t])
            G = G + beta[t, h] * np.outer(k[h, t], v[h, t])
            o[h, t] = G.T @ np.linalg.solve(H + np.diag(ridge[h]), q[h, t])
    return linear(p["out_proj"], joined(rms(p["norm"], o)))


def binary_digits(p, x, starts, levels=4):
    """Pair by pair: the level of a pair is one more than the highest bit in which the two places differ."""
    q, k, v = (of_heads(silu(convolved(p[f"{n}_conv"], linear(p[f"{n}_proj"], x), starts))) for n in "qkv")
    rate = np.exp(p["A_log"])[:, None] * softplus(linear(p["dt_proj"], x) + p["dt_bias"]).T
    scales = softplus(p["level_scales"][:, None] * of_heads(linear(p["level_proj"], x)))
    o = np.zeros_like(v)
    for h, t in np.ndindex(*v.shape[:2]):
        for s in range(starts[t], t + 1):
            apart = (t - starts[t]) ^ (s - starts[t])
            level = min(int(apart).bit_length(), levels - 1)
            weight = scales[h, t, level] * np.exp(-rate[h, s + 1 : t + 1].sum())
            o[h, t] += weight * (q[h, t] @ k[h, s]) / np.sqrt(q.shape[-1]) * v[h, s]
    return linear(p["out_proj"], rms(p["norm"], joined(o) * silu(linear(p["gate_proj"], x))))


def fading(p, x, starts):
    q, k, v = (of_heads(linear(p[f"{name}_proj"], x)) for name in "qkv")
    g, o = np.log(sigmoid(linear(p["forget_proj"], x))), np.zeros_like(v)
    for h, t in np.ndindex(*v.shape[:2]):
        seen = range(starts[t], t + 1)
        logits = [q[h, t] @ k[h, s] / np.sqrt(q.shape[-1]) + g[s + 1 : t + 1, h].sum() for s in seen]
        o[h, t] = softmax(np.array(logits)) @ v[h, starts[t] : t + 1]
    return linear(p["out_proj"], joined(o))


def reflecting(p, x, starts):
    """Every reflection of every key, one after the other."""
    q, k, v = (of_heads(linear(p[f"{name}_proj"], x)) for name in "qkv")
    low = linear(p["w_up"], linear(p["w_down"], x))
    window = np.zeros_like(low)
    for t in range(len(x)):
        for lag in range(min(3, t - starts[t] + 1)):
            window[t] += p["w_conv"]["kernel"][2 - lag] * low[t - lag]
    w, beta = unit(of_heads(silu(window))), 2 * sigmoid(linear(p["beta_proj"], x))
    o = np.zeros_like(v)
    for h, t in np.ndindex(*v.shape[:2]):
        logits = []
        for s in range(starts[t], t + 1):
            key = k[h, s]
            for u in range(s + 1, t + 1):
                key = key - beta[u, h] * w[h, u] * (w[h, u] @ key)
            logits.append(q[h, t] @ key / np.sqrt(q.shape[-1]))
        o[h, t] = softmax(np.array(logits)) @ v[h, starts[t] : t + 1]
    return linear(p["out_proj"], joined(o))


def after_convolution(p, name, x, starts):
    return convolved(p[f"{name}_conv"], linear(p[f"{name}_proj"], x), starts)


def gated_network(p, x, starts, bound=0.3):
    a, i = (after_convolution(p, name, x, starts) for name in ("decay", "input"))
    a, h = bound + (1 - bound) * sigmoid(a), np.zeros_like(i)
    for t in range(len(x)):
        h[t] = (0 if starts[t] == t else a[t] * h[t - 1]) + (1 - a[t]) * silu(i[t])
    return linear(p["out_proj"], rms(p["norm"], h) * silu(linear(p["gate_proj"], x)))


def gated_outer_products(p, x, starts, bound=0.3):
    q, a, v = (of_heads(after_convolution(p, name, x, starts)) for name in ("q", "decay", "v"))
    q, a, o = silu(q), bound + (1 - bound) * sigmoid(a), np.zeros_like(v)
    for h, t in np.ndindex(*v.shape[:2]):
        S = 0 if starts[t] == t else a[h, t][:, None] * S
        S = S + np.outer(1 - a[h, t], v[h, t])
        o[h, t] = S.T @ q[h, t] / np.sqrt(q.shape[-1])
    return linear(p["out_proj"], rms(p["norm"], joined(o)))


LOOPS = {
    "Lightning": (partial(Lightning, num_heads=2, layer=1, num_layers=5), minimax),
    "ABC": (partial(ABC, num_heads=2, num_slots=3), bounded_memory),
    "MesaNet": (partial(MesaNet, num_heads=2), least_squares),
    "LogLinearAttention": (partial(LogLinearAttention, num_heads=2, num_levels=4), binary_digits),
    "ForgettingAttention": (partial(ForgettingAttention, num_heads=2), fading),
    "PaTHAttention": (partial(PaTHAttention, num_heads=2, rank=3), reflecting),
    "H3": (partial(H3, head_width=2, state_size=6, shift_size=4), hungry_hippo),
    "RGLRU": (partial(RGLRU, num_heads=2), griffin),
    "MinGRU": (partial(MinGRU, expand=2), minimal_gru),
    "MinLSTM": (MinLSTM, minimal_lstm),
    "MLSTM": (partial(MLSTM, num_heads=2), matrix_lstm),
    "HGRN, convolved": (partial(HGRN, lower_bound=0.3, conv_window=4), gated_network),
    "HGRN2, convolved": (partial(HGRN2, num_heads=2, lower_bound=0.3, conv_window=4), gated_outer_products),
}


@pytest.mark.parametrize("name", by_default(["RGLRU", "MinGRU"], LOOPS))
def test_a_mixer_is_its_equations(name):
    """With restarts, in float64; parameters far from their start, so that all of them matter. And its slope."""
    build, loop = LOOPS[name]
    rng = np.random.default_rng(0)
    x, ids = rng.standard_normal((2, LENGTH, WIDTH)), np.cumsum(rng.random((2, LENGTH)) < 0.2, axis=1)
    starts = np.stack([[int(np.argmax(row == i)) for i in row] for row in ids])
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # flax norms promote float64 with float32
        module = build(d_model=WIDTH, param_dtype=jnp.float64)
        params = jax.jit(module.init)(jax.random.key(0), cast(x, jnp.float64))
        params = jax.tree.map(lambda p: p + 0.5 * rng.standard_normal(p.shape), params)
        plain = jax.tree.map(np.asarray, params["params"])
        by_loop = lambda x: np.stack([loop(plain, *row) for row in zip(x, starts, strict=True)])
        direction, weight = rng.standard_normal((2, *x.shape))
        slope = np.sum(weight * (by_loop(x + 1e-5 * direction) - by_loop(x - 1e-5 * direction))) / 2e-5
        weighted = lambda x: (jnp.sum(weight * module.apply(params, x, ids)), module.apply(params, x, ids))
        gradient, y = jax.jit(jax.grad(weighted, has_aux=True))(jnp.asarray(x))
        assert_close(y, by_loop(x), "float64")
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=1e-7)


@pytest.mark.parametrize("kind", by_default([DeltaNet], [DeltaNet, GatedDeltaNet, KDA, Comba, GSA]))
def test_silu_also_without_a_convolution(kind):
    """A convolution that takes its own token alone changes nothing: queries, keys and values are SiLU's either way."""
    module = kind(8, num_heads=2, conv_window=4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 7, 8)), jnp.float32)
    params = random_params(module, x)["params"]
    for name, leaf in params.items():
        if name.endswith("_conv"):
            leaf["kernel"] = jnp.zeros_like(leaf["kernel"]).at[-1].set(1)
    bare = kind(8, num_heads=2, conv_window=None)
    without = {name: leaf for name, leaf in params.items() if not name.endswith("_conv")}
    assert_close(jax.jit(bare.apply)({"params": without}, x), jax.jit(module.apply)({"params": params}, x), "mixer")


def test_the_starts_of_rwkv():
    """Uniform and of the authors' widths."""
    x, D = jnp.zeros((1, 1, 64)), 64
    six, seven = (jax.jit(m.init)(jax.random.key(0), x)["params"] for m in (RWKV6(D, 2), RWKV7(D, 2)))
    for array, bound in (
        (six["mix_up"], 0.01),
        (six["decay_up"]["kernel"], 0.01),
        (seven["r_proj"]["kernel"], 0.5 / 8),
        (seven["k_proj"]["kernel"], 0.05 / 8),
        (seven["v_proj"]["kernel"], 0.5 / 8),
    ):
        assert 0.9 * bound < array.max() <= bound and -bound <= array.min() < -0.9 * bound


def test_a_decay_beyond_all_numbers_is_no_new_segment():
    """exp(w) would be infinite: the bonus still reads what the token before wrote, and gradients are numbers."""
    module, x = RWKV6(8, num_heads=2), jnp.asarray(np.random.default_rng(0).standard_normal((1, 7, 8)), jnp.float32)
    params = random_params(module, x)["params"]
    biased = lambda w: {"params": params | {"decay_up": params["decay_up"] | {"bias": jnp.full(8, w)}}}
    apply = jax.jit(module.apply)
    assert_close(apply(biased(200.0), x), apply(biased(20.0), x), "mixer")
    gradients = jax.jit(jax.grad(lambda p: module.apply(p, x).sum()))(biased(200.0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    "module, message",
    [
        (KDA(8, channel_gates=True, negative_eigenvalues=True), r"negative_eigenvalues=True .*channel_gates=True"),
        (GLA(8, gate="fixed", min_log_decay=-5.0), r"min_log_decay=-5.0 .*gate='fixed'. takes None"),
        (GLA(8, gate="none", min_log_decay=-5.0), r"min_log_decay=-5.0 .*gate='none'. takes None"),
    ],
)
def test_what_would_do_nothing_is_named(module, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, 8)))


def test_a_layer_starts_by_its_place():
    """The last layer still forgets and still shifts: 1 − layer / num_layers is not zero. Biases reach their end."""
    np.testing.assert_allclose(lightning_log_decays(4, layer=3, num_layers=12), [0, -1.5, -3, -4.5])
    last = dict(layer=3, num_layers=4)
    start = lambda m: jax.jit(m.init)(jax.random.key(0), jnp.zeros((1, 1, 8)))["params"]
    six, seven = start(RWKV6(8, num_heads=2, **last)), start(RWKV7(8, num_heads=2, **last))
    channel = np.arange(8)
    np.testing.assert_allclose(six["mix"], 1 - (channel / 8) ** 0.25, rtol=1e-6)
    np.testing.assert_allclose(seven["mix_w"], 1 - (channel / 8) ** (0.9 * 0.25), rtol=1e-6)
    np.testing.assert_allclose(six["decay_up"]["bias"], -6 + 5 * (channel / 7) ** 2, rtol=1e-6)
    zigzag = 2.5 * np.tile(np.linspace(-1, 1, 4) * np.abs(np.linspace(-1, 1, 4)), 2)
    np.testing.assert_allclose(seven["decay_up"]["bias"], -5.5 + 6 * (channel / 7) ** 2 + zigzag, rtol=1e-6)


@pytest.mark.parametrize("kind", [RWKV6, RWKV7, Lightning])
@pytest.mark.parametrize("layer", [-1, 3])
def test_a_place_outside_the_model_is_named(kind, layer):
    with pytest.raises(ValueError, match=f"layer={layer} of num_layers=3; layers are 0 to num_layers − 1"):
        jax.eval_shape(kind(8, num_heads=2, layer=layer, num_layers=3).init, jax.random.key(0), jnp.zeros((1, 2, 8)))


@pytest.mark.parametrize(
    "module, deviation",
    [
        (RGLRU(64), {"in_proj": 1 / 8, "gate_proj": 1 / 8, "out_proj": 96**-0.5}),
        (MinGRU(64, expand=4), {"gate_proj": 192**-0.5, "candidate_proj": 192**-0.5, "out_proj": 768**-0.5}),
        (MinLSTM(64), {"forget_proj": 192**-0.5, "input_proj": 192**-0.5, "candidate_proj": 192**-0.5}),
        (MLSTM(64), {"up_proj": 160**-0.5, "gate_proj": 160**-0.5, "out_proj": 0.02}),
    ],
    ids=["RGLRU", "MinGRU", "MinLSTM", "MLSTM"],
)
def test_the_starts_of_recurrent_mixers(module, deviation):
    """Of their papers' code; uniform ones within √3 deviations."""
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    for name, expected in deviation.items():
        assert np.std(params[name]["kernel"]) == pytest.approx(expected, rel=0.05)


def test_the_start_of_mamba():
    """With the layers of the model W_out starts as the authors' linear maps do, divided by the root of their number."""
    out = lambda module: jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]["out_proj"]["kernel"]
    bound = (128 * 4) ** -0.5
    assert 0.9 * bound < np.abs(out(Mamba(64, num_layers=4))).max() <= bound
    assert np.abs(out(Mamba(64))).max() > bound
    with pytest.raises(ValueError, match="num_layers=0; Mamba takes 1 or more"):
        jax.eval_shape(Mamba(64, num_layers=0).init, jax.random.key(0), jnp.zeros((1, 1, 64)))


def test_mamba_of_constants_is_a_state_space_in_its_block():
    """With nothing selective its scan is that of S4D-Real with B by Euler's rule; the order of names says nothing."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 6)), jnp.float32)
    module = Mamba(6, state_size=4, selective=())
    params = random_params(module, x)
    p = jax.tree.map(np.asarray, params["params"])
    assert not {"x_proj", "dt_kernel"} & set(p) and p["B"].shape == p["C"].shape == (12, 4)
    u, z = np.split(linear(p["in_proj"], np.asarray(x[0])), 2, axis=-1)
    u = convolved(p["conv"], u, [0] * 9)
    u, dt = u * sigmoid(u), softplus(p["dt_bias"])
    powers = np.exp(-np.arange(9)[:, None, None] * dt[:, None] * np.exp(p["A_log"]))
    kernel = np.einsum("tdn,dn,dn,d->td", powers, p["B"], p["C"], dt)
    y = np.stack([np.sum(u[: t + 1] * kernel[t::-1], axis=0) for t in range(9)]) + p["D"] * u
    expected = linear(p["out_proj"], y * z * sigmoid(z))
    assert_close(module.apply(params, x), expected[None], "mixer")
    orders = [Mamba(6, selective=names) for names in (("dt", "B", "C"), ("C", "B", "dt"))]
    first, second = (jax.jit(m.init)(jax.random.key(0), x) for m in orders)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    for odd in (("A",), "dt"):
        with pytest.raises(ValueError, match="selective=.*; Mamba takes a tuple of some of 'dt', 'B' and 'C'"):
            Mamba(6, selective=odd).init_state(1)
