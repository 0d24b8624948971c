"""Which device holds what of a meta-training: lanes are split over a mesh, all else is on each."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from advmeta.types import PyTree

LANES = "data"  # the axis of the mesh that lanes are split over


def check_mesh(mesh: Mesh | None, lanes: int) -> Mesh | None:
    """The mesh with automatic axes: the compiler shards what the optimizee's own code does.

    Raises:
      ValueError: it has no axis "data", or one that does not divide the lanes.
    """
    if mesh is None:
        return None
    if LANES not in mesh.axis_names:
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}, and lanes are split over {LANES!r}; write "
            f"jax.make_mesh((jax.device_count(),), ({LANES!r},))"
        )
    devices = mesh.shape[LANES]
    if lanes % devices:
        raise ValueError(
            f"lanes={lanes} cannot be split evenly over {devices} devices (the axis {LANES!r} of "
            f"the mesh); write lanes={-(-lanes // devices) * devices}, or use fewer devices"
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def on_every_device(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """The same arrays on each device of the mesh."""
    return tree if mesh is None else lay_out(tree, NamedSharding(mesh, PartitionSpec()))


def lay_out(tree: PyTree, shardings: PyTree) -> PyTree:
    """Arrays of this process on the devices that the shardings name, other processes' too."""
    # `jax.device_put` does so for one process alone where a leaf is a key.
    return jax.jit(lambda tree: tree, out_shardings=shardings)(tree)


def split_over_devices(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Of every leaf, an equal part of the leading axis on each device; traced.

    The other axes stay as they are: an optimizee may shard its parameters over axes of its own.
    """
    if mesh is None:
        return tree

    def split(leaf):
        others = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
        spec = NamedSharding(mesh, PartitionSpec(LANES, *others))
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree.map(split, tree)
