"""The one place that chooses the form of an op."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
from jax import lax


def dispatch(
    op: str,
    impl: str | None,
    forms: Mapping[str, Callable],
    best: str | Mapping[str, str],
    differentiated: str | None = None,
) -> Callable:
    """The form called `impl`, or for None the best one: a name, or a name per platform beside a "default".

    With `differentiated` that form runs in both passes where impl is None and a gradient is taken. The platform is the
    one the program is lowered for, not the one it is traced on.

    Raises:
      NotImplementedError: the op has no such form; the message lists those it has.
    """
    if impl is not None:
        if impl not in forms:
            raise NotImplementedError(f"impl={impl!r} is no form of {op}; choose None, {', '.join(map(repr, forms))}.")
        return forms[impl]
    if isinstance(best, str):
        form = forms[best]
    else:
        form = partial(lax.platform_dependent, **{platform: forms[name] for platform, name in best.items()})
    if differentiated is None:
        return form
    choice = jax.custom_vjp(form)
    choice.defvjp(partial(jax.vjp, forms[differentiated]), lambda pull_back, cotangents: pull_back(cotangents))
    return choice
