"""What holds of every mixer that a command line can name."""

import jax
import jax.numpy as jnp
import pytest
from families import MIXERS, WIDTH

from jaxseq.models import ModelConfig, mixer_names


def of_name(name):
    (slot,) = ModelConfig(mixers=name, depth=1).slots()
    return slot(d_model=WIDTH)


def test_every_named_mixer_is_in_the_family_table():
    in_table = {type(member.build()) for member in MIXERS.values()}
    assert not {name for name in mixer_names() if type(of_name(name)) not in in_table}


@pytest.mark.parametrize("name", mixer_names())
def test_no_time_at_all_is_named(name):
    module = of_name(name)
    message = rf"x has shape \(2, 0, {WIDTH}\); {type(module).__name__} takes at least one step of time"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, 0, WIDTH)))
