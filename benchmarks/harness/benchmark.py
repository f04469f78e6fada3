"""What a benchmark is: its cases, and how its results are shown."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import show
from benchmarks.harness.fairness import Bench, Step, check_same, gradient_error, work_precision

Result = dict[str, Any]
"""Of a case, as it stands in the results file."""
Results = dict[str, Result]
"""By case; those that crashed left out."""
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)


class Benchmark:
    """A question, and the cases that answer it: `run` measures one, the rest shows what it found.

    `make bench` measures the cases that are not in the results file; what a case is called says
    what was measured, so a case that changes its meaning gets another name. Results may have
    `ratios`, of jaxode's time to that of a group of peers, and `best`, the fastest of each group.
    """

    title: str
    cases: Mapping[str, Any]
    """What each case is of, by name."""
    timed = True
    """If not, cases run side by side, one on each core."""
    seconds = 9.0
    """Of alternated calls, or of training, in one case."""
    limit = 1200.0
    """Seconds beyond them, after which the contender at work counts as failed."""

    def run(self, case: str, bench: Bench) -> Result:
        raise NotImplementedError

    def complete(self, result: Result, seconds: float) -> bool:
        """Whether a case with this result need not be measured again for so many seconds."""
        return True

    header: Sequence[str]
    """Of the table."""

    def rows(self, results: Results) -> Iterator[Sequence[str]]:
        raise NotImplementedError

    def table(self, results: Results) -> str:
        return show.markdown(self.header, self.rows(results))

    def brief(self, results: Results) -> str:
        """What RESULTS.md shows; `table` has all."""
        return show.brief_ratios(results)

    def draw(self, results: Results) -> Figure | None:
        """The picture that a page of the docs shows, if there is one."""
        return None


class Contest(NamedTuple):
    """The training steps, or log-densities, of one problem."""

    makers: Mapping[str, Callable[[], Step]]
    exact: Callable[[], list[np.ndarray]]
    """The result in float64, by diffrax's Dopri8: not by the library under test."""
    check: Callable[[], None] = lambda: None
    """Raises unless the mathematics in PyTorch is that in JAX."""
    tolerances: Sequence[float] = TOLERANCES
    """From loose to tight."""


class WorkPrecision(Benchmark):
    """Times at equal error: of training steps, unless `error` is another than of a gradient."""

    error_of = "gradient error"
    error: Callable[..., float] = staticmethod(gradient_error)
    target: float
    """The error at which times are compared."""
    groups: Mapping[str, Sequence[str]]
    """Peers by name of group. For each, the ratio to its fastest member is kept."""

    def contest(self, case: str) -> Contest:
        raise NotImplementedError

    def run(self, case: str, bench: Bench) -> Result:
        makers, exact, check, tolerances = self.contest(case)
        failed: dict[str, str] = {}
        check_same(failed, "the same network in PyTorch", check)
        bench.announce("reference")
        result = work_precision(
            bench, makers, exact(), tolerances, self.target, self.groups, self.error
        )  # fmt: skip
        return {**result, "failed": result["failed"] | failed}

    def table(self, results: Results) -> str:
        parts = []
        for case, result in results.items():
            target, rows = result["target_error"], []
            for name, curve in result["curves"].items():
                at = result["at_target"][name]
                shown = "not reached"
                if "median" in at:
                    shown = f"at most {show.spread(at)}" if at["note"] else show.spread(at)
                points = [f"{show.ms(row['median'])} / {row['error']:.0e}" for row in curve]
                rows.append([name, shown, str(curve[-1]["rounds"]), ", ".join(points)])
            header = [
                "", f"ms at {self.error_of} {target:.0e}, median (min-max)", "rounds",
                f"ms / {self.error_of} at each tolerance, the last two in every round",
            ]  # fmt: skip
            table = show.markdown(header, rows) + show.failures(result)
            parts.append(f"**{case}**\n\n{table}")
        return "\n\n".join(parts)
