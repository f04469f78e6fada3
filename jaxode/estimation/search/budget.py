"""How long a search may go on, and what it shows."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

from jaxode._checks.arguments import check_bool, integer, non_negative
from jaxode._jax.compile_time import compile_time
from jaxode.training.display import finish, show

# The default of `steps`, the largest number of steps on all observations.
MOST_STEPS = 200


class Budget:
    """The steps and seconds that a search may take, without compilation. Ctrl-C ends it."""

    def __init__(self, seconds: Any, steps: Any, progress: Any, least_steps: int = 1):
        check_bool("progress", progress)
        self.seconds = math.inf if seconds is None else non_negative("seconds", seconds)
        self.steps = MOST_STEPS if steps is None else integer("steps", steps, least_steps)
        self.progress = progress
        self.compile_time = compile_time()
        self.began, self.compiled_before = time.monotonic(), self.compile_time.seconds
        self.stopped = False

    @property
    def spent(self) -> float:
        """The seconds of the search so far, without compilation."""
        compiled = self.compile_time.seconds - self.compiled_before
        return time.monotonic() - self.began - compiled

    @property
    def over(self) -> bool:
        return self.stopped or self.spent >= self.seconds

    @contextlib.contextmanager
    def until_stopped(self) -> Iterator[None]:
        """Note Ctrl-C instead of raising it. A second one raises."""
        try:
            yield
        except KeyboardInterrupt:
            if self.stopped:
                raise
            self.stopped = True

    def show(self, text: str) -> None:
        """Write a progress line with the seconds so far, in place of the last one."""
        if self.progress:
            limit = "" if self.seconds == math.inf else f" of {self.seconds:g}"
            show(f"{text}, {self.spent:.0f}{limit} s")

    def finish(self) -> None:
        """End the progress line."""
        if self.progress:
            finish()

    def describe(self) -> str:
        """Say why the search ended without convergence."""
        if not self.over:
            return f"did not converge in {self.steps} steps"
        by = "Ctrl-C" if self.stopped else f"seconds={self.seconds:g}"
        return f"was ended by {by} before it converged"
