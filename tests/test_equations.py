"""Independent truth: the ops against naive NumPy loops, and against theorems of the papers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close

from jaxseq import ops
from jaxseq.layers.feature_maps import FEATURE_MAPS, Hedgehog, dpfp, quadratic, taylor
from jaxseq.layers.hippo import hippo
from jaxseq.layers.initialisers import diagonal_plus_low_rank
from jaxseq.mixers import LinearAttention
from jaxseq.ops.state_space import DISCRETISATIONS


def test_the_diagonal_of_legs_has_its_limit():
    """S4D, theorem 3: the diagonal part with B/2 acts as HiPPO-LegS does on smooth inputs, ever better as N grows."""
    steps, dt = 1500, 2e-3
    u = np.sin(np.arange(steps) * dt) ** 2  # smooth from the first moment on

    def error(N, halved=0.5):
        A, B, _ = hippo("legs", N)
        P = np.sqrt(np.arange(N) + 0.5)
        eigenvalues, V = np.linalg.eigh(-1j * (A + np.outer(P, P) + np.eye(N) / 2))
        half, complex_A = slice(0, N // 2), -0.5 + 1j * eigenvalues
        np.testing.assert_allclose(complex_A[half], diagonal_plus_low_rank("legs", N)[0], atol=1e-8)
        forward, backward = np.eye(N) + dt / 2 * A, np.linalg.inv(np.eye(N) - dt / 2 * A)
        dense, x = np.zeros((steps, 4)), np.zeros(N)
        for t in range(steps):
            x = backward @ (forward @ x + dt * B * u[t])
            dense[t] = x[:4]
        with jax.enable_x64(True):
            rows = lambda a: jnp.asarray(np.broadcast_to(a, (4, N // 2)))
            log_A, B_bar = DISCRETISATIONS["bilinear"](
                rows(complex_A[half]), rows(halved * (V.conj().T @ B)[half]), jnp.full((4, 1), dt + 0j)
            )
            inputs = jnp.asarray(np.repeat(u[None, :, None], 4, axis=2))
            diagonal, _ = ops.diagonal_state_space(inputs, log_A, B_bar, jnp.asarray(V[:4, half]))
        return np.linalg.norm(np.asarray(diagonal[0]) - dense) / np.linalg.norm(dense)

    errors = [error(N) for N in (8, 16, 32, 64)]
    assert errors[-1] < 0.01
    assert all(4 * later < earlier for earlier, later in zip(errors, errors[1:], strict=False)), errors
    assert error(64, halved=1.0) > 0.5


def test_the_gradient_of_the_decay_in_closed_form():
    """d log α_t = Σ_{i≥t} (q_i ⊙ dq_i − k_i ⊙ dk_i) + rowsum(S_T ⊙ ∂L/∂S_T), from any initial state."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(rng.standard_normal((2, 37, 2, 4))) for _ in range(3))
        g, start = jnp.asarray(-rng.uniform(0, 2, (2, 37, 2, 4))), jnp.asarray(rng.standard_normal((2, 2, 4, 4)))
        names = ("query", "key", "value", "log_decay", "initial_state")
        inputs = dict(zip(names, (q, k, v, g, start), strict=True))
        d_o, d_S = jnp.asarray(rng.standard_normal(v.shape)), jnp.asarray(rng.standard_normal(start.shape))
        # By automatic differentiation: the chunked form computes the gradient from this very identity.
        (_, S), pull_back = jax.vjp(lambda i: ops.gated_linear_attention(**i, impl="sequential"), inputs)
        (d,) = pull_back((d_o, d_S))
        sums = jnp.cumsum((q * d["query"] - k * d["key"])[:, ::-1], axis=1)[:, ::-1]
        assert_close(d["log_decay"], sums + (S * d_S).sum(-1)[:, None], 1e-10)


def test_recurrences_against_loops():
    """GLA, RWKV-6's bonus, the selective scan and the plain recurrence, with restarts, as one reads them."""
    rng = np.random.default_rng(1)
    B, T, H, K, V = 2, 23, 2, 3, 4
    q, k = rng.standard_normal((2, B, T, H, K))
    v, g, u = rng.standard_normal((B, T, H, V)), -rng.exponential(1.0, (B, T, H, K)), rng.standard_normal((H, K))
    start, ids = rng.standard_normal((B, H, K, V)), np.cumsum(rng.random((B, T)) < 0.2, axis=1)
    o, with_bonus, S = np.zeros((B, T, H, V)), np.zeros((B, T, H, V)), start.copy()
    for b, t, h in np.ndindex(B, T, H):
        before = np.zeros((K, V)) if t and ids[b, t] != ids[b, t - 1] else S[b, h].copy()
        kv = np.outer(k[b, t, h], v[b, t, h])
        S[b, h] = np.exp(g[b, t, h])[:, None] * before + kv
        o[b, t, h] = K**-0.5 * S[b, h].T @ q[b, t, h]
        with_bonus[b, t, h] = K**-0.5 * (before + u[h][:, None] * kv).T @ q[b, t, h]
    with jax.enable_x64(True):
        common = dict(initial_state=start, segment_ids=ids)
        for impl in ("sequential", "chunked"):
            op = jax.jit(partial(ops.gated_linear_attention, chunk_size=8, impl=impl))
            assert_close(op(q, k, v, g, **common), (o, S), 1e-12)
            assert_close(op(q, k, v, g, bonus=u, **common), (with_bonus, S), 1e-12)

        x, dt, A = rng.standard_normal((B, T, 4)), rng.exponential(1.0, (B, T, 4)), -rng.exponential(1.0, (4, K))
        Bs, Cs, D, h = *rng.standard_normal((2, B, T, K)), rng.standard_normal(4), np.zeros((B, 4, K))
        y, states = np.zeros((B, T, 4)), np.zeros((B, T, 4, K))
        for b, t in np.ndindex(B, T):
            h[b] *= 0 if t and ids[b, t] != ids[b, t - 1] else 1
            h[b] = np.exp(dt[b, t][:, None] * A) * h[b] + np.outer(dt[b, t] * x[b, t], Bs[b, t])
            states[b, t], y[b, t] = h[b], h[b] @ Cs[b, t] + D * x[b, t]
        for impl in ("sequential", "chunked"):
            scan = jax.jit(partial(ops.selective_scan, chunk_size=8, impl=impl))
            assert_close(scan(x, dt, A, Bs, Cs, D, segment_ids=ids), (y, h), 1e-12)
        decay, inputs = np.exp(dt[..., None] * A), (dt * x)[..., None] * Bs[:, :, None]
        assert_close(ops.linear_recurrence(decay, inputs, segment_ids=ids), (states, h), 1e-12)


@pytest.mark.parametrize(
    "options", [{}, dict(window=4), dict(causal=False, window=3), dict(logit_softcap=1.5, scale=0.7)]
)
def test_attention_against_numpy(options):
    rng = np.random.default_rng(0)
    q, ids = rng.standard_normal((2, 11, 4, 6)), np.cumsum(rng.random((2, 14)) < 0.2, axis=1)
    k, v = rng.standard_normal((2, 14, 2, 6)), rng.standard_normal((2, 14, 2, 5))
    ids[1, 3:] = 7  # the queries of row 1 begin inside segment 7, and one of them sees nothing
    query_ids = ids[:, 3:].copy()
    query_ids[1, 4] = 99
    expected = np.zeros((2, 11, 4, 5))
    for b, t, h in np.ndindex(2, 11, 4):
        logits = options.get("scale", 6**-0.5) * k[b, :, h // 2] @ q[b, t, h]
        if "logit_softcap" in options:
            logits = options["logit_softcap"] * np.tanh(logits / options["logit_softcap"])
        lag = t + 3 - np.arange(14)
        seen = (ids[b] == query_ids[b, t]) & (np.abs(lag) < options.get("window", 99))
        seen &= (lag >= 0) | (not options.get("causal", True))
        weights = np.exp(logits) * seen
        expected[b, t, h] = weights @ v[b, :, h // 2] / max(weights.sum(), 1e-300)
    with jax.enable_x64(True):
        for impl in ("sequential", "parallel", "chunked"):
            op = lambda q, k, v, impl=impl: ops.softmax_attention(
                q, k, v, segment_ids=query_ids, key_segment_ids=ids, impl=impl, chunk_size=4, **options
            )
            loss = lambda *args, op=op: (jnp.sum(op(*args) ** 2), op(*args))
            gradients, actual = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*map(jnp.asarray, (q, k, v)))
            assert_close(actual, expected, 1e-12)
            assert all(np.isfinite(x).all() for x in gradients)


def test_convolutions_against_numpy():
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 15, 3)), rng.standard_normal((15, 3))
    weight, bias, before = rng.standard_normal((4, 3)), rng.standard_normal(3), rng.standard_normal((2, 3, 3))
    ids = np.cumsum(rng.random((2, 15)) < 0.2, axis=1)
    short, long, circular = np.zeros((3, 2, 15, 3))
    inputs, segment = np.concatenate([before, x], axis=1), np.concatenate([ids[:, :1]] * 3 + [ids], axis=1)
    for b, t, d in np.ndindex(2, 15, 3):
        same = segment[b, t : t + 4] == ids[b, t]
        short[b, t, d] = (weight[:, d] * same) @ inputs[b, t : t + 4, d] + bias[d]
        long[b, t, d] = np.convolve(x[b, :, d], kernel[:, d])[t]
        circular[b, t, d] = sum(kernel[(t - s) % 15, d] * x[b, s, d] for s in range(15))
    last = np.where((segment[:, 15:] == ids[:, -1:])[..., None], inputs[:, 15:], 0)
    with jax.enable_x64(True):
        actual = jax.jit(ops.short_convolution)(x, weight, bias, initial_state=before, segment_ids=ids)
        assert_close(actual, (short, last), 1e-12)
        assert_close(ops.long_convolution(x, kernel), long, 1e-12)
        assert_close(ops.long_convolution(x, kernel, causal=False), circular, 1e-12)
        assert_close(ops.long_convolution(x, np.stack([kernel, kernel])), long, 1e-12)


def test_feature_maps_are_the_kernels_they_stand_for():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((2, 5, 3, 4)), jnp.float32) for _ in range(2))
    weight = lambda phi: np.asarray((phi(q) * phi(k)).sum(-1))
    dot = np.asarray((q * k).sum(-1))
    assert_close(weight(quadratic), dot**2, "float32")
    assert_close(weight(taylor), 1 + dot / 2 + dot**2 / 8, "float32")
    both = np.maximum(np.concatenate([q, -q], axis=-1), 0)
    sparse = [both[..., i] * both[..., i - j] for j in (1, 2, 3) for i in range(8)]
    assert_close(dpfp(q, 3), np.stack(sparse, axis=-1), "float32")
    exponentials = np.exp(2 * np.concatenate([q, -q], axis=-1))
    softmax = exponentials / exponentials.sum(-1, keepdims=True)
    assert_close(Hedgehog().init_with_output(jax.random.key(0), q)[0], softmax, "float32")


def test_a_feature_map_by_name_is_the_function():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 7, 8)), jnp.float32)
    layer = lambda phi: LinearAttention(8, num_heads=2, feature_map=phi)
    params = layer("dpfp").init(jax.random.key(0), x)
    assert_close(layer("dpfp").apply(params, x), layer(FEATURE_MAPS["dpfp"]).apply(params, x), "float32")
    assert layer(partial(dpfp, nu=2)).init_state(1).matrix.shape == (1, 2, 16, 5)
