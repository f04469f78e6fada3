"""What the examples share: arguments checked before training, how long it takes, a clean end."""

import math
import os
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawTextHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


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


def duration(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise ArgumentTypeError(f"must be a positive number of seconds; got {text}")
    return float(text)


def training(name: str, doc: str | None, seconds: float, width: int, batch: int) -> ArgumentParser:
    """The arguments of an example that calls `jaxode.fit`."""
    parser = ArgumentParser(description=doc, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--seconds", type=duration, default=seconds, help="of training, at most")
    parser.add_argument("--steps", type=count, help="of training, at most")
    parser.add_argument("--batch", type=count, default=batch, help="rows in a training step")
    parser.add_argument("--width", type=count, default=width, help="of the residual network")
    parser.add_argument("--out", type=picture, default=f"out/{name}.png", help="the picture")
    parser.add_argument("--seed", type=seed, default=0)
    return parser


def announce(doc: str | None) -> None:
    """Print how long an example takes: the sentence of its docstring that says so."""
    sentence = re.search(r"[A-Z][^.]*?\s+on\s+two\s+cores[^.]*\.", doc or "")
    if sentence:
        print(" ".join(sentence[0].split()), flush=True)


def run(main: Callable[[], Any]) -> None:
    """Run an example as a script. Ctrl-C ends it with one word.

    Compiled programs are kept, so that a second run starts at once.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(__file__).parent.parent / ".jax_cache" / "examples"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Stopped.")
        sys.exit(130)
