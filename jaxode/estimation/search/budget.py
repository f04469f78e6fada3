"""How long a search may go on, and what it shows."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

from jaxode._checks.arguments import check_bool, integer, non_negative
from jaxode.training.display import finish, show

MOST_STEPS = 200  # on all observations, at most


class Budget:
    """Steps and seconds that are left. Ctrl-C ends both."""

    def __init__(self, seconds: Any, steps: Any, progress: Any):
        check_bool("progress", progress)
        self.seconds = math.inf if seconds is None else non_negative("seconds", seconds)
        self.steps = MOST_STEPS if steps is None else integer("steps", steps)
        self.progress = progress
        self.began = time.monotonic()
        self.stopped = False

    @property
    def over(self) -> bool:
        return self.stopped or time.monotonic() - self.began >= self.seconds

    @contextlib.contextmanager
    def until_stopped(self) -> Iterator[None]:
        """Note Ctrl-C in place of raising it, but for a second one."""
        try:
            yield
        except KeyboardInterrupt:
            if self.stopped:
                raise
            self.stopped = True

    def show(self, part: str, done: int, count: int, best: float) -> None:
        """Write a line about the search."""
        if self.progress:
            spent = time.monotonic() - self.began
            left = "" if self.seconds == math.inf else f" of {self.seconds:g}"
            show(f"{part}: {done} of {count} starts, best cost {best:.6g}, {spent:.0f}{left} s")

    def finish(self) -> None:
        """End the last line."""
        if self.progress:
            finish()

    def describe(self) -> str:
        """When the search ended without convergence."""
        if not self.over:
            return f"did not converge in {self.steps} steps"
        by = "Ctrl-C" if self.stopped else f"seconds={self.seconds:g}"
        return f"was ended by {by} before it converged"
