"""How long JAX has compiled, which limits in seconds leave out."""

import functools
import time

import jax

# JAX reports the seconds that it has traced, lowered or compiled by events of these names.
COMPILING = "/jax/core/compile/"


class CompileTime:
    """Sums the seconds of compilation in this process, from its first use on."""

    def __init__(self):
        self.seconds = 0.0
        self.intervals: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self.add)

    def add(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Note what JAX has just done. A program that is traced within another one counts once."""
        if not event.startswith(COMPILING):
            return
        end = time.perf_counter()
        begin = end - duration_secs
        while self.intervals and self.intervals[-1][0] >= begin:
            inner_begin, inner_end = self.intervals.pop()
            self.seconds -= inner_end - inner_begin
        if self.intervals:
            begin = max(begin, self.intervals[-1][1])
        self.intervals.append((begin, end))
        self.seconds += end - begin


@functools.cache
def compile_time() -> CompileTime:
    """The only one in this process, because JAX keeps each listener."""
    return CompileTime()
