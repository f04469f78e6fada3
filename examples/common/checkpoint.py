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
from common.arguments import InputError


def save(path: Path, params: Any, record: Any, settings: dict[str, Any]) -> None:
    """Write a temporary file, then rename it: there is a complete checkpoint at every moment.

    `params` is a pytree of arrays. The record says how training went, in numbers and lists.
    """
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, params)
    content = buffer.getvalue()
    header = {"settings": settings, "record": record, "arrays": _arrays_of(params)}
    header["sha256"] = _digest(header, content)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n" + content)
        file.flush()
        os.fsync(file.fileno())  # the content must reach the disk before the name
    os.replace(unfinished, path)


def load(path: Path, like: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Parameters and record. `InputError` if missing, damaged, or from another training run."""
    try:
        line, _, content = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    try:
        header = json.loads(line)
        whole = header.pop("sha256") == _digest(header, content)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise InputError(
            f"{path} is damaged, or not a checkpoint. Delete it to train from the start"
        )
    saved = header["settings"]
    differ = [f"{name} {saved.get(name)}" for name in settings if saved.get(name) != settings[name]]
    if differ:
        raise InputError(
            f"{path} was saved with other settings: {', '.join(differ)}. "
            "Use those, or another --checkpoint"
        )
    if header["arrays"] != _arrays_of(like):
        raise InputError(
            f"{path} was saved by another version of this script, or in another precision. "
            "Delete it to train from the start"
        )
    return eqx.tree_deserialise_leaves(io.BytesIO(content), like), header["record"]


def _arrays_of(params: Any) -> list[str]:
    """The dtype and shape of each array."""
    return [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(params)]


def _digest(header: dict[str, Any], content: bytes) -> str:
    return hashlib.sha256(json.dumps(header).encode() + content).hexdigest()
