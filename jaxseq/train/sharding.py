"""Where arrays live: the device mesh, and which axis of which parameter is split over which of its axes."""

import math
import re
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .. import sharded
from .config import MeshConfig
from .paths import PyTree, path_string

TIME = sharded.AXIS
AXES = ("data", "fsdp", "tensor", TIME)
BATCH = ("data", "fsdp")

Rules = tuple[tuple[str, P], ...]

# The first pattern found in a parameter's path decides. A spec speaks of the trailing axes, so that it also fits
# parameters stacked over layers. A table is split by rows alone: splitting its width too makes XLA gather it whole.
TABLE = r"(^|/)embedding$"
RULES: Rules = (
    (TABLE, P(("tensor", "fsdp"), None)),
    (r"conv/kernel$", P(None, "tensor")),
    (r"(^|/)(out|down)\w*/kernel$", P("tensor", "fsdp")),
    (r"(^|/)kernel$", P("fsdp", "tensor")),
)


def device_mesh(config: MeshConfig | None = None) -> Mesh:
    """The mesh of the first data x fsdp x tensor x sequence devices.

    Raises:
      ValueError: there are fewer devices, or several processes and more devices.
    """
    config = config or MeshConfig()
    shape = tuple(getattr(config, name) for name in AXES)
    needed, devices = math.prod(shape), jax.devices()
    sizes = (
        " x ".join(f"mesh.{name}={size}" for name, size in zip(AXES, shape, strict=True) if size > 1) or "mesh.data=1"
    )
    if needed > len(devices):
        raise ValueError(f"{sizes} needs {needed} devices; {len(devices)} here ({devices[0].platform}): lower mesh.*.")
    if jax.process_count() > 1 and needed != len(devices):
        raise ValueError(f"{sizes} uses {needed} of {len(devices)} devices; several processes must use them all.")
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices[:needed])


def check_mesh(mesh: Mesh) -> None:
    if mesh.axis_names != AXES or any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"mesh has axes {mesh.axis_names} of types {mesh.axis_types}; build it with device_mesh(config)."
        )


def shardings(tree: PyTree, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """A sharding for every array by the first rule found in its path; without one it is replicated.

    The paths of optimizer moments end like those of their parameters, so that they are split alike. A mesh axis that
    does not divide its array axis is left out.
    """

    def sharding(path, leaf) -> NamedSharding:
        spec = next((spec for pattern, spec in rules if re.search(pattern, path_string(path))), P())
        return NamedSharding(mesh, _fitted(spec, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _fitted(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    if not 0 < len(spec) <= len(shape):
        return P()
    trailing = zip(spec, shape[len(shape) - len(spec) :], strict=True)
    fits = [axes if axes and size % _devices(mesh, axes) == 0 else None for axes, size in trailing]
    return P(*[None] * (len(shape) - len(spec)), *fits)


def _devices(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes))


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Put a batch on the mesh: rows over data and fsdp, time (axis 1) over sequence.

    Every process is given the whole batch and puts its own part on its own devices.

    Raises:
      ValueError: mesh.sequence is above 1, and arrays have other time axes than one another or one it does not divide.
    """
    split = mesh.shape[TIME]
    times = [x.shape[1] for x in jax.tree.leaves(batch) if x.ndim > 1]
    if split > 1 and (len(set(times)) != 1 or times[0] % split):
        raise ValueError(
            f"mesh.sequence={split} does not divide axis 1 of all arrays in the batch alike (lengths {times}); it is "
            "their time: give arrays without time one axis, and pad the others."
        )

    def put(x):
        sharding = NamedSharding(mesh, P(BATCH, *_time(x, mesh)))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, batch)


def _time(x, mesh: Mesh) -> tuple[str, ...]:
    """How axis 1 of an array of the batch is split."""
    return (TIME,) if mesh.shape[TIME] > 1 and x.ndim > 1 else ()


def over_time(loss: Callable, mesh: Mesh) -> Callable:
    """`loss(params, batch, key) -> (scalar, metrics)` where time is split over the mesh axis sequence.

    Each device computes its part of the time, with mixers that pass on states (`jaxseq.sharded`). What still differs
    from device to device is averaged; `cross_entropy` is a mean over all tokens of all devices already.
    """
    if mesh.shape[TIME] == 1:
        return loss

    def mean(*args):
        varying = lambda x: TIME in jax.typeof(x).manual_axis_type.varying
        return jax.tree.map(lambda x: lax.pmean(x, TIME) if varying(x) else x, loss(*args))

    def whole_table(path, x):
        # Looking up, beside a manual axis, rows that are split over devices aborts XLA's partitioner (jaxlib 0.11).
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P())) if re.search(TABLE, path_string(path)) else x

    def split(params, batch, key):
        params = jax.tree_util.tree_map_with_path(whole_table, params)
        times = jax.tree.map(lambda x: P(None, *_time(x, mesh)), batch)
        parts = jax.shard_map(mean, mesh=mesh, in_specs=(P(), times, P()), out_specs=P(), axis_names={TIME})
        return parts(params, batch, key)

    return split
