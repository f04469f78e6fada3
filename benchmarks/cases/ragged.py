"""The training step of a Neural ODE on series of unequal length, each with its own times.

256 series start and end at their own times, and are seen at 2 to 64 times each, padded by
repeating the last. jaxode solves them in one call; diffrax by `vmap` of a solve; torchode as a
batch. diffrax's BacksolveAdjoint, which took 17 seconds a step here, is not among them. Memory is
that which the compiler allots for the step, for a small network and a large one.
"""

from functools import partial
from typing import Any, NamedTuple

from benchmarks.cases.ffjord_step import in_torch
from benchmarks.harness import show
from benchmarks.harness.benchmark import Contest, Result, Results, WorkPrecision
from benchmarks.harness.fairness import Bench, attempt
from benchmarks.harness.problems import Series, ragged
from benchmarks.peers import odes

DIFFRAX = "diffrax vmap checkpointed"
IN_JAX = {"jaxode": odes.series_by_jaxode, DIFFRAX: odes.series_by_diffrax}


class Size(NamedTuple):
    rows: int = 256
    most: int = 64
    """Times of a series."""
    widths: tuple[int, ...] = (64, 512)
    """Of the network, and of others whose memory is also looked at."""

    def problem(self, width: int) -> Series:
        return ragged(self.rows, self.most, 4, width)


class Ragged(WorkPrecision):
    title = "Training step on ragged series"
    cases = {"256 series of 2 to 64 times, 64-64": Size()}
    target = 1e-4
    groups = {"diffrax": [DIFFRAX], "torchode": ["torchode"]}

    def contest(self, case: str) -> Contest:
        size: Size = self.cases[case]
        p = size.problem(size.widths[0])
        makers: dict[str, Any] = {
            name: partial(odes.series_step, p, ys) for name, ys in IN_JAX.items()
        }
        makers["torchode"] = lambda: in_torch().torchode_series_step(p)
        check = lambda: in_torch().check_fields(p)
        return Contest(makers, lambda: odes.exact_of_series(p), check)

    def run(self, case: str, bench: Bench) -> Result:
        result, size = super().run(case, bench), self.cases[case]

        def mebibytes(name: str, width: int) -> float | None:
            step = odes.series_step(size.problem(width), IN_JAX[name])
            allotted = lambda: step.temporary_bytes(1e-5) / 2**20
            return attempt(bench, result["failed"], name, allotted)

        memory = {name: [mebibytes(name, width) for width in size.widths] for name in IN_JAX}
        return {**result, "memory": memory}

    def table(self, results: Results) -> str:
        rows = []
        for result in results.values():
            for name, sizes in result["memory"].items():
                rows.append([name, *("" if size is None else f"{size:.1f}" for size in sizes)])
        widths = next(iter(self.cases.values())).widths
        header = ["MiB", *(f"{width}-{width}" for width in widths)]
        return super().table(results) + "\n\n" + show.markdown(header, rows)


BENCHMARK = Ragged()
