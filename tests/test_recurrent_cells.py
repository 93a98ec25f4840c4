"""Nonlinear cells as mixers: against recorded outputs, and solved in parallel at length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close
from recorded import load, recorded

from jaxseq.mixers import GRU, LSTM


@recorded
def test_lstm_is_the_peers():
    """The low level of HiSS: a linear map, an LSTM over each chunk from its start, a linear map of the last state."""
    z = load("hiss")
    at = "lstm.p.low_level"
    get = lambda name: np.asarray(z[f"{at}.{name}"], np.float32)
    chunk = int(z["cfg.chunk"])
    x = np.asarray(z["x"]).reshape(-1, chunk, 4) @ get("embed.weight").T + get("embed.bias")
    params = {
        "in_proj": {"kernel": get("lstm.weight_ih_l0").T, "bias": get("lstm.bias_ih_l0") + get("lstm.bias_hh_l0")},
        "recurrent_kernel": get("lstm.weight_hh_l0").T,
    }
    for impl in ("sequential", "parallel"):
        y = jax.jit(LSTM(8, forget_bias=0.0, impl=impl).apply)({"params": params}, jnp.asarray(x))
        last = (y[:, -1] @ get("decoder.weight").T + get("decoder.bias")[None]).reshape(2, 6, 8)
        np.testing.assert_allclose(last, z["lstm.low_level_last"], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"block_size": 128}, {"jacobian": "diagonal"}], ids=str)
@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_parallel_at_length(kind, options):
    """1,024 tokens, weights as they start and half as large again: equal to steps, without falling back."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1024, 8)), jnp.float32)
    params = kind(8).init(jax.random.key(0), x)
    for scale in (1.0, 1.5):
        scaled = jax.tree.map(lambda w, scale=scale: scale * w, params)

        def everything(module, scaled=scaled):
            y, sown = module.apply(scaled, x, mutable=["intermediates"])
            return y, sown, jax.grad(lambda p: jnp.sum(jnp.sin(module.apply(p, x))))(scaled)

        expected, _, slopes = jax.jit(lambda: everything(kind(8)))()
        y, sown, gradients = jax.jit(lambda: everything(kind(8, impl="parallel", **options)))()
        (done,) = sown["intermediates"]["newton"]
        assert done.converged.all() and done.iterations.max() <= 50
        np.testing.assert_allclose(y, expected, atol=1e-5)
        assert_close(gradients, slopes, 1e-4)
