"""The devices to train on, and what the processes that own them must agree on."""

import dataclasses
import functools
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from jaxode._checks.caller import arg
from jaxode._jax.sharding import on_all, split_over

T = TypeVar("T")
MAX_DESCRIPTION_BYTES = 512  # of what processes compare


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a mesh, in one process or several, or the default device.

    Each of several processes has rows of its own.
    """

    mesh: Mesh | None = None

    @classmethod
    def from_mesh(cls, mesh: Any, batch_size: int) -> "Devices":
        """Check that a batch can be split over the devices of a mesh."""
        if mesh is None:
            return cls()
        if not isinstance(mesh, Mesh):
            raise TypeError(
                f"{arg('mesh')} must be a mesh of JAX, or None; got {type(mesh).__name__}. Pass "
                'jax.sharding.Mesh(jax.devices(), "batch").'
            )
        if batch_size % mesh.size:
            nearest = max(batch_size // mesh.size, 1) * mesh.size
            raise ValueError(
                f"{arg('mesh')} must have a number of devices that divides the {batch_size} rows "
                f"of a batch; got {mesh.size}. Pass batch_size={nearest}."
            )
        return cls(Mesh(mesh.devices, mesh.axis_names))  # without types of its axes

    @functools.cached_property
    def several_processes(self) -> bool:
        """Whether there are devices of other processes."""
        if self.mesh is None:
            return False
        return len({device.process_index for device in self.mesh.devices.flat}) > 1

    @property
    def first_process(self) -> bool:
        """Whether this process is the only one, or the first of several."""
        return not self.several_processes or jax.process_index() == 0

    def of_first(self, number: float) -> float:
        """The number that the first process has: they read different clocks."""
        if not self.several_processes:
            return number
        # By its bits, since JAX may round to float32.
        from jax.experimental import multihost_utils  # `import jaxode` does not load it

        bits = np.frombuffer(np.float64(number).tobytes(), np.uint32)
        return float(
            np.frombuffer(np.asarray(multihost_utils.broadcast_one_to_all(bits)), np.float64)[0]
        )

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.gathered(np.array([flag])).any())

    def gathered(self, rows: Any) -> Any:
        """The rows of all processes: as many of each as the one with the fewest has."""
        if not self.several_processes:
            return rows
        from jax.experimental import multihost_utils

        def gather(rows):
            return multihost_utils.process_allgather(rows, tiled=True)

        few = int(gather(np.array([len(jax.tree.leaves(rows)[0])])).min())
        return jax.tree.map(lambda leaf: np.asarray(gather(np.asarray(leaf)[:few])), rows)

    def check_alike(self, arguments: str) -> None:
        """Raise in all processes unless they describe their arguments in the same words."""
        if not self.several_processes:
            return
        from jax.experimental import multihost_utils

        length = MAX_DESCRIPTION_BYTES
        description = np.frombuffer(arguments.encode()[:length].ljust(length), np.uint8)
        every = np.asarray(multihost_utils.process_allgather(description))
        texts = [bytes(row).decode(errors="replace").strip() for row in every]
        if len(set(texts)) > 1:
            raise ValueError(
                "fit(mesh=...): the processes must pass the same columns, key and options; got "
                + "; ".join(f"{text} in process {i}" for i, text in enumerate(texts))
                + "."
            )

    def own_key(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """A key that no other process has."""
        return jax.random.fold_in(key, jax.process_index()) if self.several_processes else key

    def put_state(self, state: T) -> T:
        """Copy arrays to every device."""
        return on_all(state, self.mesh)

    def put_rows(self, rows: T) -> T:
        """Copy rows to every device, or split those of each process over its devices."""
        if self.several_processes:
            assert self.mesh is not None
            return split_over(rows, self.mesh)
        return on_all(rows, self.mesh)

    def from_all(self, params: PyTree) -> PyTree:
        """Parameters that every device has, as arrays that any program can use."""
        if self.mesh is None:
            return params

        def on_host(leaf):
            return jnp.asarray(np.asarray(leaf)) if eqx.is_array(leaf) else leaf

        return jax.tree.map(on_host, params)
