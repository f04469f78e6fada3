"""Training in several processes, each with its own rows: what they must agree on."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

SAID = 512  # bytes of a description


def are_several(mesh: Mesh | None) -> bool:
    """Whether a mesh has devices of other processes."""
    return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


def of_first(number: float, mesh: Mesh | None) -> float:
    """The number that the first process has, in all of them: they read different clocks."""
    if not are_several(mesh):
        return number
    # By its bits, since JAX may round to float32.
    from jax.experimental import multihost_utils  # `import jaxode` does not load it

    bits = np.frombuffer(np.float64(number).tobytes(), np.uint32)
    return float(
        np.frombuffer(np.asarray(multihost_utils.broadcast_one_to_all(bits)), np.float64)[0]
    )


def gathered(rows: Any, mesh: Mesh | None) -> Any:
    """The rows of all processes, in all of them: as many of each as the one with the fewest has."""
    if not are_several(mesh):
        return rows
    from jax.experimental import multihost_utils

    gather = lambda rows: multihost_utils.process_allgather(rows, tiled=True)
    few = int(gather(np.array([len(jax.tree.leaves(rows)[0])])).min())
    return jax.tree.map(lambda leaf: np.asarray(gather(np.asarray(leaf)[:few])), rows)


def check_alike(given: str, mesh: Mesh | None) -> None:
    """Raise in all processes, unless they describe what they were given in the same words."""
    if not are_several(mesh):
        return
    from jax.experimental import multihost_utils

    said = np.frombuffer(given.encode()[:SAID].ljust(SAID), np.uint8)
    every = np.asarray(multihost_utils.process_allgather(said))
    texts = [bytes(row).decode(errors="replace").strip() for row in every]
    if len(set(texts)) > 1:
        raise ValueError(
            "fit(mesh=...): the processes must pass the same columns, key and options; got "
            + "; ".join(f"{text} in process {i}" for i, text in enumerate(texts))
            + "."
        )
