"""Checkpoints of a training run: one Equinox file, replaced atomically, with a header of JSON.

Prefer orbax if the state is spread over several hosts.
"""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import equinox as eqx
import jax


def save(path: Path, state: Any, settings: dict[str, Any]) -> None:
    """Write a temporary file, then rename it: there is a complete checkpoint at every moment.

    The state is a pytree of arrays, one of which is its `step`.
    """
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, state)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    header = {
        "step": int(state.step), "settings": settings, "arrays": arrays_of(state), "sha256": digest
    }  # fmt: skip
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n" + content)
        file.flush()
        os.fsync(file.fileno())  # the content must reach the disk before the name
    os.replace(unfinished, path)


def arrays_of(state: Any) -> list[str]:
    """The dtype and shape of each array."""
    return [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(state)]


def load(path: Path, like: Any, settings: dict[str, Any]) -> Any:
    """The saved state. `ValueError` if it is missing, damaged, or from another training run."""
    try:
        line, _, content = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    try:
        header = json.loads(line)
        whole = hashlib.sha256(content).hexdigest() == header["sha256"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path} is damaged, or not a checkpoint. Delete it to train from the start"
        )
    saved = header["settings"]
    differ = [f"{name} {saved.get(name)}" for name in settings if saved.get(name) != settings[name]]
    if differ:
        raise ValueError(
            f"{path} was saved with other settings: {', '.join(differ)}. "
            "Use those, or another --checkpoint"
        )
    if header.get("arrays") != arrays_of(like):
        raise ValueError(
            f"{path} was saved by another version of this script, or in another precision. "
            "Delete it to train from the start"
        )
    return eqx.tree_deserialise_leaves(io.BytesIO(content), like)
