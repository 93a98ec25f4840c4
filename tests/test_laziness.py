"""Initial weights of a low rank, and how much what was learned moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import load, recorded

from jaxseq.analysis import (
    effective_rank,
    gram_alignment,
    kernel_alignment,
    representation_alignment,
    tangent_kernel,
)
from jaxseq.layers.initialisers import low_rank


def states(params, x):
    """The recorded network at α = 1: h = relu(x W_in + h W_0ᵀ), its last state."""
    h = jnp.zeros((x.shape[1], len(params["recurrent"])), x.dtype)
    for x_t in x:
        h = jax.nn.relu(x_t @ params["in"] + h @ params["recurrent"].T)
    return h


@recorded
@pytest.mark.parametrize("rank", [1, 3, 10])
def test_measures_are_the_recorded_ones(rank):
    z = load("seeds_rich_lazy_measures")
    with jax.enable_x64(True):
        x = jnp.asarray(z["x"])
        W = low_rank(lambda *_: jnp.asarray(z["W0"]), rank)(None, (10, 10))
        np.testing.assert_allclose(W, z[f"W0_rank{rank}"], atol=1e-9)
        before = {"in": jnp.asarray(z["Win"]), "recurrent": W, "out": jnp.asarray(z["Wout"])}
        after = before | {"recurrent": W + jnp.asarray(z["dW"])}
        h, moved = states(before, x), states(after, x)
        np.testing.assert_allclose(h, z[f"h_last_before_rank{rank}"], atol=1e-9)
        np.testing.assert_allclose(moved, z[f"h_last_after_rank{rank}"], atol=1e-9)
        assert representation_alignment(h, moved) == pytest.approx(float(z[f"rep_alignment_rank{rank}"]), abs=1e-9)
        outputs, probes = lambda params, x: states(params, x[:, None])[0] @ params["out"], x.swapaxes(0, 1)
        K = tangent_kernel(outputs, before, probes, "recurrent")
        # Theirs is of finite differences.
        np.testing.assert_allclose(K, z[f"K_before_rank{rank}"], rtol=1e-8, atol=1e-8)
        found = kernel_alignment(outputs, before, after, probes, "recurrent")
        assert found == pytest.approx(float(z[f"kernel_alignment_rank{rank}"]), abs=1e-8)


def test_low_rank_keeps_the_norm():
    base = jax.nn.initializers.normal(0.1)
    key = jax.random.key(0)
    for rank in (1, 5, 20):
        W = low_rank(base, rank)(key, (20, 30))
        assert np.linalg.matrix_rank(W, tol=1e-4) == rank
        assert np.linalg.norm(W) == pytest.approx(np.linalg.norm(base(key, (20, 30))), rel=1e-6)
    for rank in (0, 21):
        with pytest.raises(ValueError, match=f"rank={rank}; of a matrix of shape \\(20, 30\\) it is 1 to 20"):
            low_rank(base, rank)(key, (20, 30))


def test_alignment_is_one_of_itself_whatever_the_order():
    rng = np.random.default_rng(0)
    H, order = rng.standard_normal((6, 4)), rng.permutation(6)
    other = H + rng.standard_normal((6, 4))
    assert representation_alignment(H, 3 * H) == pytest.approx(1)
    assert representation_alignment(H[order], other[order]) == pytest.approx(representation_alignment(H, other))
    assert 0 < representation_alignment(H, other) < 1
    with pytest.raises(ValueError, match="they are states of one network"):
        representation_alignment(H, other[:, 1:])


def test_the_tangent_kernel_of_a_linear_map_is_the_gram_matrix_of_its_probes():
    """For each output, and of none with another; of the bias alone it is 1."""
    X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(2)}
    kernel = jax.jit(
        lambda params, select: tangent_kernel(
            lambda params, x: params["kernel"] @ x + params["bias"], params, X, select
        ),
        static_argnums=1,
    )
    np.testing.assert_allclose(kernel(params, "kernel"), np.kron(X @ X.T, np.eye(2)), atol=1e-6)
    np.testing.assert_allclose(kernel(params, "bias"), np.kron(np.ones((4, 4)), np.eye(2)))
    np.testing.assert_allclose(kernel(params, ""), np.kron(1 + X @ X.T, np.eye(2)), atol=1e-6)


def test_effective_rank_counts_equal_singular_values():
    assert effective_rank(np.diag([2.0, 2, 2, 0])) == pytest.approx(3)
    assert 1 < effective_rank(np.diag([5.0, 0.1])) < 1.2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: effective_rank(np.zeros((2, 2))), "matrix is zero"),
        (lambda: gram_alignment(np.eye(2), np.eye(3)), r"before has shape \(2, 2\), after \(3, 3\)"),
        (lambda: gram_alignment(np.eye(2), 0 * np.eye(2)), "not zero"),
        (lambda: gram_alignment(np.eye(2), np.nan * np.eye(2)), "finite"),
        (
            lambda: tangent_kernel(lambda p, x: p["w"] * x, {"w": jnp.ones(2)}, jnp.ones((3, 2)), "gate"),
            r"select='gate' is in none of the paths \['w'\]",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
