"""`jaxode.save` and `jaxode.load`: a model as one file that outlives a release."""

import os
import sys
from typing import Any

from jaxode._checks.caller import arg, public
from jaxode.saving.container import Contents, UnreadableError, read, write
from jaxode.saving.reader import ABSENT, Reader, missing_names
from jaxode.saving.registry import class_of_name
from jaxode.saving.writer import Writer


@public("save")
def save(path: str | os.PathLike[str], model: Any) -> None:
    """Write a model to a file, which `jaxode.load` reads bit for bit, in this and later versions.

    The file is a zip archive as `numpy.savez` writes it: arrays, and `model.json`, which says what
    they belong to. It holds no code. An old file at `path` is replaced when the new one is whole.

    Args:
        path: the file.
        model: a `Density`, a `Table`, a `Series`, an `Estimate`, a `PopulationEstimate`, a network
            of `jaxode.nn`; or a tuple, list or plain dictionary of them, of arrays, numbers and
            text, such as `(params, optimizer_state, key)`. Functions and networks of your own are
            left out, with their arrays kept: `load(like=...)` takes them.

    Raises:
        TypeError: if the model holds what no file can: arrays of Python objects, open files, ...
        ValueError: if it is traced.
        OSError: if the file cannot be written.
    """
    writer = Writer()
    try:
        description = writer.describe(model)
    except RecursionError:
        raise ValueError(
            f"{arg('model')} must not hold itself; got one that is too deep. Save its parts."
        ) from None
    write(path, Contents(description, writer.arrays), sys.modules["jaxode"].__version__)


@public("load")
def load(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Read a model that `jaxode.save` wrote. Nothing in the file is executed.

    Args:
        path: the file.
        like: the functions and networks of your own that the model needs: the one, or a dictionary
            of several by their names, or a model like that in the file. Arrays come from the file,
            and must have the shapes and dtypes of those in `like`.

    Returns:
        The model, on the default device.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is not a whole file of `jaxode.save`, if it is of a later version, if it
            needs `like`, or another one, and if it holds numbers of 64 bits but JAX has not.
    """
    with open(path, "rb") as file:
        try:
            contents = read(file)
            names, kind = missing_names(contents.model), _type_of(contents.model)
        except Exception as error:
            raise _sentence(path, error) from None
    by_name, template = _read_like(kind, names, like)
    try:
        return Reader(contents.arrays, by_name).build(contents.model, template)
    except Exception as error:
        raise _sentence(path, error) from None


def _sentence(path: Any, error: Exception) -> ValueError:
    """The error of a file that cannot be read."""
    if isinstance(error, UnreadableError):
        fault = str(error)
    else:
        fault = f"is damaged ({type(error).__name__}: {error}). Save the model again"
    return ValueError(f"{arg('path')} {os.fspath(path)} {fault}.")


def _read_like(kind: type, names: dict[str, str], like: Any) -> tuple[dict[str, Any], Any]:
    """Read `like`: objects of the user by name, or else a template of the whole model.

    Args:
        kind: the type of the model.
        names: of the objects that the file lacks, with their places.
        like: as the user passes it.

    Returns:
        The objects by name, and the template, of which at most one is there.
    """
    listed = ", ".join(f"{name!r} (at {place or 'the top'})" for name, place in names.items())
    if like is None:
        if not names:
            return {}, ABSENT
        pairs = ", ".join(f"{name!r}: ..." for name in names)
        remedy = "like=" + (f"{{{pairs}}}" if len(names) > 1 else f"..., your {next(iter(names))}")
        raise ValueError(
            f"{arg('like')} must have what is not in the file, since it is yours: {listed}. Pass "
            f"{remedy}."
        )
    if names and isinstance(like, dict) and names.keys() <= like.keys():
        return like, ABSENT
    if type(like) is kind:
        return {}, like
    if len(names) == 1 and type(like) not in (dict, list, tuple):
        return {next(iter(names)): like}, ABSENT
    if not names:
        raise ValueError(
            f"{arg('like')} must be left out, or be like the model in the file, which needs "
            f"nothing else; got {type(like).__name__}."
        )
    raise ValueError(
        f"{arg('like')} must be a dictionary of {listed}, or like the model in the file; got "
        f"{type(like).__name__}."
    )


def _type_of(model: Any) -> type:
    """The type of the object of a description."""
    if isinstance(model, list):
        return tuple
    if isinstance(model, dict):
        if "class" in model:
            return class_of_name(model["class"]) or object
        return {"list": list, "dict": dict}.get(next(iter(model)), object)
    return type(model)
