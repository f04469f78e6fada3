"""Temporary memory of a training step, as the compiler allots it, against what it could grow with.

Nothing runs: `memory_analysis()` of the compiled value and gradient of the likelihood.
"""

from collections.abc import Callable
from functools import partial

import diffrax
import equinox as eqx
import jax

import jaxode
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench, JaxStep, attempt
from benchmarks.harness.problems import FlowProblem, Workload, untrained
from benchmarks.peers import flows


def makers(p: FlowProblem, max_steps: int) -> dict[str, Callable[[], JaxStep]]:
    ours = partial(flows.jaxode_step, p, max_steps=max_steps)
    theirs = partial(flows.diffrax_step, p, max_steps=max_steps)
    return {
        "jaxode": ours,
        "jaxode per sample": partial(ours, batch="per_sample"),
        "jaxode backsolve": partial(ours, adjoint=jaxode.BacksolveAdjoint()),
        "diffrax checkpointed": theirs,
        "diffrax vmap checkpointed": partial(theirs, per_sample=True),
        "diffrax backsolve": partial(theirs, adjoint=diffrax.BacksolveAdjoint()),
        "jax odeint": partial(flows.odeint_step, p),
    }


class Memory(Benchmark):
    title = "Temporary memory of a training step"
    timed = False
    base = {"max_steps": 4096, "width": 64, "batch": 64, "dim": 8}
    cases = {"max_steps": (256, 65536), "width": (64, 1024), "batch": (64, 4096), "dim": (8, 512)}
    labels = {"width": "parameters"}
    """What is on the axis, if it is not the case itself."""

    def run(self, case: str, bench: Bench) -> Result:
        failed: dict[str, str] = {}
        curves: dict[str, list[list[float]]] = {}
        for value in self.cases[case]:
            settings = {**self.base, case: value}
            size = settings["dim"], settings["batch"], 2 * (settings["width"],)
            p, nn = (untrained(Workload(*size, own=own)) for own in (True, False))
            at = value
            if case == "width":  # what matters is the number of parameters
                at = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(p.params, eqx.is_array)))
            of_user, of_nn = (makers(q, settings["max_steps"]) for q in (p, nn))
            for name, make in (of_user | {"jaxode, jaxode.nn": of_nn["jaxode"]}).items():
                allotted = lambda make=make: make().temporary_bytes(1e-5)
                size = attempt(bench, failed, name, allotted)
                if size is not None:
                    curves.setdefault(name, []).append([at, size])
        mine = curves["jaxode"][-1][1]
        ratios = {f"memory, {peer}": mine / curves[peer][-1][1] for peer in show.peers(curves)}
        return {"failed": failed, "curves": curves, "ratios": ratios}

    def mebibytes(self, results: Results) -> dict[str, dict[str, dict[float, float]]]:
        """By what varies, contender, and value."""
        return {
            self.labels.get(case, case): {
                name: {at: size / 2**20 for at, size in curve}
                for name, curve in result["curves"].items()
            }
            for case, result in results.items()
        }

    def table(self, results: Results) -> str:
        tables = []
        for varied, curves in self.mebibytes(results).items():
            values = list(dict.fromkeys(at for curve in curves.values() for at in curve))
            rows = [
                [name, *(f"{curve[at]:.2f}" if at in curve else "" for at in values)]
                for name, curve in curves.items()
            ]
            tables.append(show.markdown(["MiB", *(f"{varied} {at}" for at in values)], rows))
        return "\n\n".join(tables) + "".join(map(show.failures, results.values()))


BENCHMARK = Memory()
