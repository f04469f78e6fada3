"""Words for what JAX cannot trace in a user's function: NumPy, branches, and Python's numbers."""

import os
import re
import traceback
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import numpy as np

from jaxode._checks.caller import caller

LIBRARIES = (
    f"{Path(__file__).parents[1]}{os.sep}",
    *(f"{Path(str(module.__file__)).parent}{os.sep}" for module in (jax, np, eqx, diffrax)),
)


def traced_use(name: str, error: Exception) -> str | None:
    """The message for an error of the user's function `name` that needs a number while JAX traces,
    with the line that does so. None for other errors."""
    line, place = _line_of_user(error)
    if isinstance(error, jax.errors.TracerArrayConversionError):
        does, cure = "uses NumPy on", "Write jnp for NumPy, also for an array that it indexes."
        called = re.findall(r"\b(np|numpy)\.([\w.]+)\(", line)
        if len(called) == 1:
            ((library, function),) = called
            cure = f"Write jnp.{function} for {library}.{function}."
    elif isinstance(error, jax.errors.TracerBoolConversionError):
        does = "branches on"
        cure = "Write jnp.where; where it switches at a known time, also pass breakpoints."
    elif isinstance(error, jax.errors.TracerIntegerConversionError):
        does, cure = (
            "counts or indexes by",
            "Index an array of jnp, and count by jax.lax.fori_loop.",
        )
    elif isinstance(error, jax.errors.ConcretizationTypeError):
        does, cure = "makes a number of Python of", "Leave float, int and .item() out."
        called = re.findall(r"\bmath\.(\w+)\(", line)
        if len(called) == 1:
            does, cure = "uses math on", f"Write jnp.{called[0]} for math.{called[0]}."
    else:
        return None
    return f"{caller()}: {name} {does} an array that JAX traces, {place}. {cure}"


def _line_of_user(error: Exception) -> tuple[str, str]:
    """The last line outside of libraries on the way to an error, and where it is."""
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)]
    if not frames:
        return "", "in a library that it calls"
    line = frames[-1].line or ""
    return line, f"in line {frames[-1].lineno} of {frames[-1].filename}: `{line}`"
