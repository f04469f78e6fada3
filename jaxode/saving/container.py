"""The file of a model: a zip archive of NumPy arrays and a description in JSON.

`model.json` says what the model is made of, `0.npy`, `1.npy`, ... are its arrays, as
`numpy.savez` writes them. So other programs can read the numbers, and nothing is executed.
"""

import contextlib
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxode._checks.caller import arg

FORMAT = "jaxode model"
VERSION = 1  # of the description; a file of a later one is refused
DESCRIPTION = "model.json"
NO_DATE = (1980, 1, 1, 0, 0, 0)  # the same model gives the same file


class Contents(NamedTuple):
    """What a file holds."""

    model: Any
    """The description of the model, for `reader.build`."""
    arrays: list[np.ndarray]


def write(path: str | os.PathLike[str], contents: Contents, version: str) -> None:
    """Write a file, or leave the old one as it was. `version` is that of jaxode."""
    path = Path(path)
    header = {"format": FORMAT, "version": VERSION, "jaxode": version, "model": contents.model}
    text = json.dumps(header, allow_nan=False, ensure_ascii=False, indent=1)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            _add(archive, DESCRIPTION, text.encode(), zipfile.ZIP_DEFLATED)
            for i, array in enumerate(contents.arrays):
                data = io.BytesIO()
                np.lib.format.write_array(data, array, allow_pickle=False)
                _add(archive, f"{i}.npy", data.getvalue(), zipfile.ZIP_STORED)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _add(archive: zipfile.ZipFile, name: str, data: bytes, compression: int) -> None:
    entry = zipfile.ZipInfo(name, NO_DATE)
    entry.compress_type = compression
    archive.writestr(entry, data)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a file.

    Raises:
        ValueError: if it is not a whole file of this format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if DESCRIPTION not in names:
                raise _damaged(path, f"an archive without {DESCRIPTION}")
            header = json.loads(archive.read(DESCRIPTION))
            _check_header(path, header)
            count = sum(name.endswith(".npy") for name in names)
            arrays = [_array(archive.read(f"{i}.npy")) for i in range(count)]
    except zipfile.BadZipFile as error:
        with open(path, "rb") as file:
            start = file.read(4)
        what = "a part of a file" if start.startswith(b"PK") else f"a file that starts with {start}"
        raise _damaged(path, f"{what} ({error})") from None
    except (KeyError, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise _damaged(path, f"a damaged file ({error})") from None
    except json.JSONDecodeError as error:
        raise _damaged(path, f"a description that is not JSON ({error})") from None
    return Contents(header["model"], arrays)


def _array(data: bytes) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise EOFError(str(error)) from None


def _check_header(path: Any, header: Any) -> None:
    if not isinstance(header, dict) or header.get("format") != FORMAT or "model" not in header:
        raise _damaged(path, f"an archive with another {DESCRIPTION}")
    version = header.get("version")
    if not isinstance(version, int):
        raise _damaged(path, f"the version {version!r}")
    if version > VERSION:
        raise ValueError(
            f"{arg('path')} {os.fspath(path)} was written by jaxode {header.get('jaxode')} in "
            f"version {version} of its files; this one reads versions up to {VERSION}. Update "
            "jaxode."
        )


def _damaged(path: Any, what: str) -> ValueError:
    return ValueError(
        f"{arg('path')} must be a file that jaxode.save wrote; got {what}, {os.fspath(path)}. "
        "Save the model again."
    )
