"""The contract of every causal mixer: one body, `prefill`, and the names that follow from it."""

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..segments import padded_segments
from ..shapes import Array, Float, Int, accumulator, check_width, typed


def check_place(layer: int, num_layers: int) -> None:
    """Raise unless it is the place of a layer in a model of so many."""
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer={layer} of num_layers={num_layers}; layers are 0 to num_layers − 1.")


def stateless(why: str, *methods: str) -> tuple[Callable, ...]:
    """Methods of these names, for the body of a module that keeps no state: each says so, and why."""

    def refused(method: str) -> Callable:
        def raises(self, *args, **kwargs):
            raise NotImplementedError(f"{method}: {why}")

        return nn.nowrap(raises)

    return tuple(map(refused, methods))


def at_least(module: nn.Module, **least: int) -> None:
    """Raise unless every field named is so large, or None."""
    for name, bound in least.items():
        if (value := getattr(module, name)) is not None and value < bound:
            raise ValueError(f"{name}={value}; {type(module).__name__} takes {bound} or more.")


def above_zero(module: nn.Module, *names: str) -> None:
    """Raise unless every field named is a number above 0."""
    for name in names:
        if not getattr(module, name) > 0:
            raise ValueError(f"{name}={getattr(module, name)}; {type(module).__name__} takes a number above 0.")


def check_min_log_decay(module: nn.Module) -> None:
    """Raise unless the module's `min_log_decay` is below 0, or None."""
    if module.min_log_decay is not None and not module.min_log_decay < 0:
        raise ValueError(
            f"min_log_decay={module.min_log_decay}; {type(module).__name__} takes a number below 0, or None."
        )


def past_padding(mixer: nn.Module, segment_ids: Array | None, mask: Array | None) -> tuple[Array | None, dict]:
    """The segments and further inputs with which a mixer sees nothing of the end of a row that `mask` leaves out.

    What is causal does not see it anyhow. What looks ahead is handed the mask where it has an argument of this name, as
    those have that sum over a row; for all others the padding is a segment of its own.
    """
    if mask is None or (isinstance(mixer, Mixer) and mixer.looks_ahead() is None):
        return segment_ids, {}
    body = mixer.prefill if isinstance(mixer, Mixer) else mixer.__call__
    if "mask" in inspect.signature(body).parameters:
        return segment_ids, {"mask": mask}
    return padded_segments(segment_ids, mask), {}


class Mixer(nn.Module):
    """A map `B T D → B T D` with a state, causal unless `looks_ahead` says otherwise. A subclass writes two methods:

    `prefill(x, state, segment_ids=None) -> (y, state)`: the sequence x, continuing from `state`; None is the start
    of a sequence. Two parts with the state in between equal the whole. The state continues the segment of the first
    token; a change of `segment_ids` inside the call restarts. Further inputs `B T …` are keywords, which the other
    names hand on.
    `init_state(batch_size, *, max_length=None, dtype=float32) -> state`: the state at the start of a sequence, a
    pytree of the structure, shapes and dtypes that `prefill` returns. It needs no parameters. What always looks ahead
    has none, and `prefill` returns None for it.
    """

    def prefill(self, x, state: Any, segment_ids=None):
        raise NotImplementedError(f"{type(self).__name__} defines no prefill.")

    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32):
        self.check_causal()
        raise NotImplementedError(f"{type(self).__name__} defines no init_state.")

    def __call__(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None, **inputs):
        """The whole sequence from the start: `B T D → B T D`."""
        return self.prefill(x, self.start(x, max_length=0), segment_ids, **inputs)[0]

    @typed
    def step(self, x: Float[Array, "B D"], state: Any, **inputs):
        """One token: `(x_t "B D", state) → (y_t "B D", state)`."""
        self.check_causal()
        y, state = self.prefill(x[:, None], state, **{name: value[:, None] for name, value in inputs.items()})
        return y[:, 0], state

    def in_stack(self, x, state: Any, segment_ids, handed: dict[str, Array], **inputs):
        """`prefill` above other layers: `(y, state, handed)`, what they hand on by name, and then this one too."""
        return *self.prefill(x, state, segment_ids, **inputs), handed

    def start(self, x: Array, *, max_length: int | None = None):
        """The state at the start of the sequence x; `max_length=0` leaves no room for a cache after this call.

        None for a mixer that looks ahead.
        """
        if self.looks_ahead() is not None:
            return None
        return self.init_state(x.shape[0], max_length=max_length, dtype=accumulator(x.dtype))

    def resumed(self, x: Array, state: Any, *, max_length: int | None = None):
        """What `prefill` continues from: `state`, or what `start` says for the sequence x.

        Raises:
          ValueError: x is no sequence to take.
          TypeError: `state` is that of something else.
          NotImplementedError: a state is given to what looks ahead.
        """
        check_width(x, self.d_model, type(self).__name__)
        if state is None:
            return self.start(x, max_length=max_length)
        self.check_causal()
        due = type(jax.eval_shape(lambda: self.init_state(1, max_length=0)))
        if issubclass(due, tuple) and not isinstance(state, due):
            given, owner = type(state).__name__, type(self).__name__
            raise TypeError(f"state is a {given}; {owner} takes a {due.__name__}, or None.")
        return state

    @nn.nowrap
    def looks_ahead(self) -> str | None:
        """The field, if any, by which outputs see what comes later: there is no state then, and `__call__` alone.

        It is "" where no field makes a difference.
        """
        return None

    @nn.nowrap
    def writes_in_place(self) -> bool:
        """Whether a step writes to a small part of a large state, which a scan over layers would copy (`Stack`)."""
        return False

    @nn.nowrap
    def check_causal(self) -> None:
        """Raise where it looks ahead."""
        if (field := self.looks_ahead()) is not None:
            by_field = f"({field})" if field else ""
            raise NotImplementedError(f"{type(self).__name__}{by_field} looks ahead: it has no state.")

    @nn.nowrap
    def check_mask(self, mask: Array | None) -> None:
        """Raise where one is given to what is causal."""
        if mask is not None and self.looks_ahead() is None:
            raise ValueError(
                f"mask: {type(self).__name__} is causal here: it sees no padding behind, and padding in front takes a "
                "segment of its own."
            )

    def checked_heads(self, **numbers: int) -> None:
        """Raise unless every number of heads divides `d_model`."""
        for name, number in numbers.items():
            if number < 1 or self.d_model % number:
                divisors = ", ".join(str(n) for n in range(1, self.d_model + 1) if self.d_model % n == 0)
                raise ValueError(f"{name}={number} does not divide d_model={self.d_model}; choose one of {divisors}.")

    def head_widths(self, num_heads: int, *, field: str = "num_heads", **expansions: float) -> tuple[int, ...]:
        """Channels a head, where all heads together have this multiple of `d_model`; raise unless they are whole.

        `field` is what the number of heads is called.
        """
        if num_heads < 1:
            self.checked_heads(**{field: num_heads})
        widths = [expansion * self.d_model / num_heads for expansion in expansions.values()]
        for (name, expansion), width in zip(expansions.items(), widths, strict=True):
            if width < 1 or width != int(width):
                self.checked_heads(**{field: num_heads})
                raise ValueError(f"{name}={expansion} gives {width:g} channels a head; choose a whole number.")
        return tuple(int(width) for width in widths)

    def value_heads(self, num_heads: int, num_value_heads: int | None, expand_k: float, expand_v: float):
        """Value heads, and channels of a key and of a value head, where key heads serve runs of value heads."""
        (key_width,) = self.head_widths(num_heads, expand_k=expand_k)
        field, count = ("num_heads", num_heads) if num_value_heads is None else ("num_value_heads", num_value_heads)
        if count % num_heads:
            raise ValueError(f"num_value_heads={count} is no multiple of num_heads={num_heads}.")
        (value_width,) = self.head_widths(count, field=field, expand_v=expand_v)
        return count, key_width, value_width

    def key_value_heads(self, num_heads: int, num_kv_heads: int | None, expand_k: float, expand_v: float):
        """Query heads, key and value heads, channels of a key and of a value, where these serve runs of query heads."""
        widths = self.head_widths(num_heads, expand_k=expand_k, expand_v=expand_v)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_kv_heads={kv_heads} does not divide num_heads={num_heads}.")
        return num_heads, kv_heads, *widths
