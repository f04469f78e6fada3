"""How long a call may go on, what it shows meanwhile, and how Ctrl-C ends it."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

from jaxode._checks.arguments import check_bool, integer, non_negative
from jaxode._jax.compile_time import compile_time
from jaxode.training.devices import Devices

DEFAULT_SECONDS = 60.0  # of a call that nothing else ends
LINE_CHARACTERS = 100  # to which a line of a terminal is filled up, to cover the one before


class Stopwatch:
    """The seconds that count: while it runs, without those in which JAX compiles."""

    def __init__(self):
        self.compile_time = compile_time()
        self.began = time.perf_counter()
        self.before = 0.0  # seconds, until the watch was last stopped
        self.started: float | None = None
        self.interrupted = False

    @property
    def now(self) -> float:
        """A clock that stands still while JAX compiles."""
        return time.perf_counter() - self.compile_time.seconds

    @property
    def since_call(self) -> float:
        """All seconds since the call."""
        return time.perf_counter() - self.began

    @property
    def spent(self) -> float:
        """The seconds that count so far."""
        return self.before + (0.0 if self.started is None else self.now - self.started)

    def start(self) -> None:
        """Count from now on."""
        self.started = self.now

    @contextlib.contextmanager
    def running(self, devices: Devices = Devices()) -> Iterator[None]:
        """Count the time within. All processes have the clock of the first one."""
        self.start()
        try:
            yield
        finally:
            self.before, self.started = self.spent, None
        self.before = devices.of_first(self.before)


@dataclasses.dataclass(frozen=True)
class Budget:
    """The steps and seconds that a call or a phase of it may take. Ctrl-C ends it."""

    steps: float = math.inf
    seconds: float = math.inf
    """Up to which the stopwatch may go."""
    progress: bool = False
    stopwatch: Stopwatch = dataclasses.field(default_factory=Stopwatch)

    @classmethod
    def from_arguments(
        cls,
        steps: Any,
        seconds: Any,
        progress: Any,
        *,
        default_steps: float = math.inf,
        least_steps: int = 1,
    ) -> "Budget":
        """The budget of the user: of a minute, if neither the user nor the default ends it."""
        check_bool("progress", progress)
        most = default_steps if steps is None else integer("steps", steps, least_steps)
        if seconds is not None:
            end = non_negative("seconds", seconds)
        else:
            end = DEFAULT_SECONDS if most == math.inf else math.inf
        return cls(most, end, progress)

    def of_steps(self, steps: float) -> "Budget":
        """A budget of so many steps, of a phase after those that seconds end."""
        return dataclasses.replace(self, steps=steps, seconds=math.inf)

    @property
    def timed(self) -> bool:
        return self.seconds < math.inf

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C has ended it."""
        return self.stopwatch.interrupted

    @property
    def seconds_left(self) -> float:
        return 0.0 if self.interrupted else max(self.seconds - self.stopwatch.spent, 0.0)

    @property
    def over(self) -> bool:
        """Whether Ctrl-C or the seconds have ended it."""
        return self.seconds_left == 0

    @contextlib.contextmanager
    def until_interrupted(self) -> Iterator[None]:
        """Note Ctrl-C instead of raising it. A second one raises."""
        try:
            yield
        except KeyboardInterrupt:
            if self.interrupted:
                raise
            self.stopwatch.interrupted = True

    def show(self, text: str) -> None:
        """Show a line with the seconds so far."""
        limit = f" of {self.seconds:g}" if self.timed else ""
        self.write(f"{text}, {self.stopwatch.spent:.0f}{limit} s")

    def write(self, text: str, *, in_file: bool = True) -> None:
        """Write a line on stderr: over the last one on a terminal, and elsewhere if `in_file`."""
        if self.progress and sys.stderr.isatty():
            print(f"\r{text:<{LINE_CHARACTERS}}", end="", file=sys.stderr, flush=True)
        elif self.progress and in_file:
            print(text, file=sys.stderr, flush=True)

    def finish(self) -> None:
        """End the last line of a terminal."""
        if self.progress and sys.stderr.isatty():
            print(file=sys.stderr)

    def describe(self) -> str:
        """Say why a search ended without convergence."""
        if not self.over:
            return f"did not converge in {self.steps} steps"
        by = "Ctrl-C" if self.interrupted else f"seconds={self.seconds:g}"
        return f"was ended by {by} before it converged"
