"""The file of a model: a zip archive of NumPy arrays and a description in JSON.

`model.json` is the description, and `0.npy`, `1.npy`, ... are the arrays, as `numpy.savez` writes
them. So other programs can read the numbers, and nothing is executed.
"""

import contextlib
import io
import json
import os
import secrets
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxode._checks.caller import arg

FORMAT = "jaxode model"
VERSION = 1  # of descriptions; this release refuses files of later ones
DESCRIPTION = "model.json"
NO_DATE = (1980, 1, 1, 0, 0, 0)  # the date of all entries, so that equal models give equal files


class UnreadableError(Exception):
    """A file cannot be read. The message ends a sentence that begins with its path."""


class Contents(NamedTuple):
    """The contents of a file."""

    model: Any
    """The description of the model, for `Reader.build`."""
    arrays: list[np.ndarray]


def write(path: str | os.PathLike[str], contents: Contents, version: str) -> None:
    """Write a whole file, or leave an old one as it was. `version` is that of jaxode."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{arg('path')} must be in a folder that exists; got {path}. Make the folder."
        )
    header = {"format": FORMAT, "version": VERSION, "jaxode": version, "model": contents.model}
    text = json.dumps(header, allow_nan=False, ensure_ascii=False, indent=1)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with unfinished.open("xb") as file, zipfile.ZipFile(file, "w") as archive:
            _add(archive, DESCRIPTION, text.encode(), zipfile.ZIP_DEFLATED)
            for i, array in enumerate(contents.arrays):
                data = io.BytesIO()
                np.lib.format.write_array(data, array, allow_pickle=False)
                _add(archive, f"{i}.npy", data.getvalue(), zipfile.ZIP_STORED)
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
        raise


def _add(archive: zipfile.ZipFile, name: str, data: bytes, compression: int) -> None:
    entry = zipfile.ZipInfo(name, NO_DATE)
    entry.compress_type = compression
    archive.writestr(entry, data)


def read(file: BinaryIO) -> Contents:
    """Read a file.

    Raises:
        UnreadableError: if it is no archive of this format, or of a later version.
        Exception: any other, if it is damaged.
    """
    start = file.read(4)
    if not start.startswith(b"PK"):
        raise UnreadableError(f"was not written by jaxode.save: it starts with {start}")
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise UnreadableError(f"is a part of a file: {error}. Save the model again") from None
    with archive:
        names = archive.namelist()
        if DESCRIPTION not in names:
            raise UnreadableError(f"was not written by jaxode.save: it has no {DESCRIPTION}")
        header = json.loads(archive.read(DESCRIPTION))
        _check_header(header)
        count = sum(name.endswith(".npy") for name in names)
        arrays = [_array(archive.read(f"{i}.npy")) for i in range(count)]
    return Contents(header["model"], arrays)


def _array(data: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _check_header(header: Any) -> None:
    """Raise unless this version of jaxode reads such descriptions."""
    if not isinstance(header, dict) or header.get("format") != FORMAT or "model" not in header:
        raise UnreadableError(f"was not written by jaxode.save: it has another {DESCRIPTION}")
    version = header.get("version")
    if type(version) is not int or version < 1:
        raise UnreadableError(f"is damaged: it has the version {version!r}. Save the model again")
    if version > VERSION:
        raise UnreadableError(
            f"was written by jaxode {header.get('jaxode')} in version {version} of its files; this "
            f"one reads versions up to {VERSION}. Update jaxode"
        )
