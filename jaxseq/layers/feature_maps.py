"""Feature maps φ of linear attention, `B T H K` → `B T H F`: φ(q)·φ(k) is the weight of a token."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def elu_plus_one(x: jax.Array) -> jax.Array:
    """elu(x) + 1 (arXiv 2006.16236, eq. 7)."""
    return nn.elu(x) + 1


def identity(x: jax.Array) -> jax.Array:
    return x


def quadratic(x: jax.Array) -> jax.Array:
    """φ(q)·φ(k) = (q·k)²: x_i², and √2 x_i x_j for i < j."""
    pairs = [2**0.5 * x[..., i : i + 1] * x[..., i + 1 :] for i in range(x.shape[-1] - 1)]
    return jnp.concatenate([x**2, *pairs], axis=-1)


def taylor(x: jax.Array) -> jax.Array:
    """φ(q)·φ(k) = 1 + s + s²/2, the start of exp(s), with s = q·k / √K (Based, arXiv 2402.18668)."""
    x = x * x.shape[-1] ** -0.25
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, 0.5**0.5 * quadratic(x)], axis=-1)


def dpfp(x: jax.Array, nu: int = 1) -> jax.Array:
    """r ⊙ roll(r, j) for j = 1 … ν, r = relu([x, −x]) (arXiv 2102.11174): sparse, and 2νK wide."""
    r = nn.relu(jnp.concatenate([x, -x], axis=-1))
    return jnp.concatenate([r * jnp.roll(r, j, axis=-1) for j in range(1, nu + 1)], axis=-1)


class Hadamard(nn.Module):
    """(W_1 x + b_1) ⊙ (W_2 x + b_2), the weights shared by all heads."""

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _dense("first", self, x, use_bias=True) * _dense("second", self, x, use_bias=True)


class T2R(nn.Module):
    """relu(W x), learned when a transformer becomes a recurrent network (arXiv 2103.13076; no bias)."""

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(_dense("proj", self, x))


class Hedgehog(nn.Module):
    """softmax([2 W x, −2 W x]), W the identity at the start (arXiv 2402.04347)."""

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        z = 2 * _dense("proj", self, x, kernel_init=lambda key, shape, dtype: jnp.eye(shape[0], dtype=dtype))
        return nn.softmax(jnp.concatenate([z, -z], axis=-1))


def _dense(name, module, x, use_bias=False, **options):
    return nn.Dense(
        x.shape[-1], use_bias=use_bias, dtype=module.dtype, param_dtype=module.param_dtype, name=name, **options
    )(x)


FEATURE_MAPS: dict[str, Any] = {
    "elu": elu_plus_one,
    "relu": nn.relu,
    "identity": identity,
    "taylor": taylor,
    "dpfp": dpfp,
    "hadamard": Hadamard,
    "t2r": T2R,
    "hedgehog": Hedgehog,
}


def feature_map(kind: str | Callable, owner: nn.Module, **options) -> Callable[[jax.Array], jax.Array]:
    """The function itself, or the one that a name of FEATURE_MAPS stands for; `options` go to those that are modules.

    Raises:
      ValueError: the name is unknown.
    """
    if isinstance(kind, str) and kind not in FEATURE_MAPS:
        raise ValueError(
            f"feature_map={kind!r} is unknown to {type(owner).__name__}; choose one of {', '.join(FEATURE_MAPS)}, "
            "or a function."
        )
    function = FEATURE_MAPS[kind] if isinstance(kind, str) else kind
    if isinstance(function, type):
        return function(dtype=owner.dtype, param_dtype=owner.param_dtype, **options)
    return function


def feature_width(kind: str | Callable, owner: nn.Module, width: int) -> int:
    """F of a head of this width."""
    function, x = feature_map(kind, owner, parent=None), jax.ShapeDtypeStruct((1, 1, 1, width), jnp.float32)
    if isinstance(function, nn.Module):
        return jax.eval_shape(function.init_with_output, jax.random.key(0), x)[0].shape[-1]
    return jax.eval_shape(function, x).shape[-1]
