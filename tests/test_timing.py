"""Forms side by side: what is measured, what is left out, and how an exponent is read off."""

import math

import jax
import jax.numpy as jnp

from jaxseq.analysis import Case, exponent, side_by_side


def test_every_form_is_compiled_and_those_that_fit_are_run():
    small = lambda x: jnp.sin(x)
    large = lambda x: jnp.sin(jnp.sort(jnp.broadcast_to(x[None], (64, *x.shape)) * 2, axis=0)).sum(0)
    case = Case("sine", 256, lambda key: (jax.random.normal(key, (4, 256)),), {"small": small, "large": large})
    one, other = side_by_side(case, repeats=1, seconds=0.0, most_mib=0.1)
    assert one.forward_speed == one.training_speed == 1 and one.forward_ms > 0
    assert math.isnan(other.training_ms) and other.training_mib > 0.1 and other.training_compile_seconds > 0


def test_a_form_is_called_with_what_is_its_own():
    """And its gradient is taken of that too: of 64 rows that are its own the program keeps more than of one."""
    forms = {"few": lambda w, x: x @ w, "many": lambda w, x: jnp.tanh(x @ w.T) @ w}
    own = {"few": (jnp.ones((16, 16)),), "many": (jnp.ones((64, 16)),)}
    case = Case("product", 16, lambda key: (jax.random.normal(key, (4, 16)),), forms, own)
    few, many = side_by_side(case, repeats=1, seconds=0.0)
    assert few.training_ms > 0 and many.training_mib > few.training_mib


def test_an_exponent_is_the_slope_in_logarithms():
    assert math.isclose(exponent([2, 4, 16], [12, 48, 768]), 2)
    assert math.isclose(exponent([2, 4, 16], [1, math.nan, 8]), 1)
    assert math.isnan(exponent([4, 4], [1, 2]))
