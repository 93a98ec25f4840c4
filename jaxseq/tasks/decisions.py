"""Decisions asked of animals, as networks of neurons are trained on them: which is more, and is it the same again."""

import jax
import jax.numpy as jnp

from ..shapes import Array, Float, Int
from .draws import integers, require


def two_choices(
    key: Array, *, num_examples: int, stimulus: int = 7, decision: int = 1, noise: float = 0.15
) -> tuple[Float[Array, "N T 3"], Int[Array, "N"]]:
    """`(inputs, labels)`: which of two noisy channels has the larger mean (two-alternative forced choice).

    For `stimulus` steps a channel that says "wait" is 1 and the others are (1 ± c) / 2 + `noise` ε, with c uniform in
    [−1, 1] for each example; for `decision` steps all are noise. The label is 1 where the second mean is larger.

    Raises:
      ValueError: a number is below 1, or `noise` is negative.
    """
    _check("two_choices", noise, num_examples=num_examples, stimulus=stimulus, decision=decision)
    k_means, k_noise = jax.random.split(key)
    c = jax.random.uniform(k_means, (num_examples,), minval=-1.0)
    means = jnp.stack([1 - c, 1 + c], axis=-1) / 2
    shown = jnp.arange(stimulus + decision) < stimulus
    return _noisy(k_noise, means[:, None] * shown[None, :, None].astype(means.dtype), shown, noise), (c > 0).astype(
        jnp.int32
    )


def delayed_match(
    key: Array, *, num_examples: int, shown: int = 3, delay: int = 3, decision: int = 1, noise: float = 0.15
) -> tuple[Float[Array, "N T 3"], Int[Array, "N"]]:
    """`(inputs, labels)`: whether the second of two stimuli is the first one again (delayed match to sample).

    A stimulus is one of two channels at 1, plus `noise` ε. The first lasts `shown` steps, none is there for `delay`,
    the second lasts `shown` steps, and `decision` steps follow; a channel that says "wait" is 1 until these.

    Raises:
      ValueError: a number is below 1, or `noise` is negative.
    """
    _check("delayed_match", noise, num_examples=num_examples, shown=shown, delay=delay, decision=decision)
    k_which, k_noise = jax.random.split(key)
    which = integers(k_which, (num_examples, 2), 0, 2)
    sizes = (shown, delay, shown, decision)
    when = jnp.repeat(jnp.arange(4), jnp.asarray(sizes), total_repeat_length=sum(sizes))
    first, second = (
        jax.nn.one_hot(which[:, n], 2)[:, None] * (when == at)[None, :, None].astype(jnp.float32)
        for n, at in ((0, 0), (1, 2))
    )
    return _noisy(k_noise, first + second, when < 3, noise), (which[:, 0] == which[:, 1]).astype(jnp.int32)


def _noisy(key: Array, signals: Float[Array, "N T 2"], waiting: Array, noise: float) -> Float[Array, "N T 3"]:
    signals = signals + noise * jax.random.normal(key, signals.shape)
    wait = jnp.broadcast_to(waiting[None, :, None].astype(signals.dtype), (*signals.shape[:2], 1))
    return jnp.concatenate([wait, signals], axis=-1)


def _check(task: str, noise: float, **sizes: int) -> None:
    require(task, {}, **sizes)
    if not noise >= 0:
        raise ValueError(f"noise={noise}; {task} takes 0 or more.")
