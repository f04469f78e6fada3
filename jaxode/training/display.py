"""Lines that show how far a training is."""

import sys

LINE_CHARACTERS = 100  # to which a line is filled up, to cover the one before


def show(text: str, *, look: bool = True) -> None:
    """Write a line on stderr: over the last one on a terminal, and elsewhere one for each look."""
    if sys.stderr.isatty():
        print(f"\r{text:<{LINE_CHARACTERS}}", end="", file=sys.stderr, flush=True)
    elif look:
        print(text, file=sys.stderr, flush=True)


def finish() -> None:
    """End the last line of a terminal."""
    if sys.stderr.isatty():
        print(file=sys.stderr)


def described(phase: str, steps: str, nats: float, best: float) -> str:
    """The text of a validation: its mean negative log-density, and the best one so far."""
    return f"{phase}: step {steps}, validation loss {nats:.3f} nats, best {best:.3f}"
