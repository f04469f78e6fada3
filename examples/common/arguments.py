"""What the examples share: arguments checked before training, how long it takes, a clean end."""

import inspect
import math
import os
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawTextHelpFormatter
from collections.abc import Callable
from pathlib import Path

import jax
import matplotlib

import jaxode


class InputError(ValueError):
    """What the user gave cannot be used. Ends an example with its message."""


def writable(text: str) -> Path:
    """A file that can be written. Makes its folder."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentTypeError(f"cannot make the folder of {path}: {error.strerror}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ArgumentTypeError(f"cannot write {path}")
    return path


def beside(out: Path, suffix: str) -> Path:
    """The file with this suffix beside a picture, checked as that is."""
    try:
        return writable(str(out.with_suffix(suffix)))
    except ArgumentTypeError as error:
        raise InputError(str(error)) from None


def picture(text: str) -> Path:
    if Path(text).suffix not in (".png", ".pdf", ".svg"):
        raise ArgumentTypeError(f"must name a .png, .pdf or .svg file; got {text}")
    return writable(text)


def seed(text: str) -> int:
    """A seed that both JAX and NumPy accept."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise ArgumentTypeError(f"must be at least 0 and below 2**31; got {text}")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number of at least 1; got {text}")
    return int(text)


def positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise ArgumentTypeError(f"must be a positive number; got {text}")
    return float(text)


# Options that several examples have: what checks the value, and the help.
SHARED = {
    "steps": (count, "of training"),
    "batch": (count, "rows in a training step"),
    "width": (count, "of the hidden layers"),
    "rate": (positive, "learning rate"),
}


def parser(script: str, doc: str | None, **defaults: float | None) -> ArgumentParser:
    """The arguments of an example: `--out`, `--seed`, and shared ones with these defaults."""
    matplotlib.use("Agg")  # pictures go to files
    made = ArgumentParser(description=doc, formatter_class=RawTextHelpFormatter)
    for option, default in defaults.items():
        kind, text = SHARED[option]
        text += "" if default is None else f" (default {default:g})"
        made.add_argument(f"--{option}", type=kind, default=default, help=text)
    made.add_argument("--out", type=picture, default=f"out/{Path(script).stem}.png",
                      help="the picture (default %(default)s)")  # fmt: skip
    made.add_argument("--seed", type=seed, default=0, help="(default 0)")
    return made


def announce(doc: str | None) -> None:
    """Print how long an example takes: the sentence of its docstring that says so."""
    sentence = re.search(r"[A-Z][^.]*?\s+on\s+two\s+cores[^.]*\.", doc or "")
    if sentence:
        print(" ".join(sentence[0].split()), flush=True)


def status(main: Callable[[list[str] | None], int], arguments: list[str] | None = None) -> int:
    """Run an example, and return its exit status. What ends it early is one line."""
    try:
        return main(arguments)
    except KeyboardInterrupt:
        print("Stopped.")
        return 130
    except (InputError, FloatingPointError, jaxode.SolveError) as error:
        print(f"{Path(inspect.getfile(main)).stem}: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def run(main: Callable[[list[str] | None], int]) -> None:
    """Run an example as a script. Compiled programs are kept: a second run starts at once."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(__file__).parents[2] / ".jax_cache" / "examples"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    sys.exit(status(main))
