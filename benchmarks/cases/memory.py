"""Temporary memory of a training step, as the compiler allots it, against what it could grow with.

Nothing runs: `memory_analysis()` of the compiled value and gradient of the likelihood.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
from matplotlib.figure import Figure

import jaxode
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench, attempt, temporary_bytes
from benchmarks.harness.problems import FlowProblem, Workload, untrained
from benchmarks.peers import flows


def contenders(p: FlowProblem, max_steps: int) -> dict[str, tuple[Any, Any, bool]]:
    """The loss, its noise, and whether its tolerance is known to the compiler."""
    backsolve = diffrax.BacksolveAdjoint()
    ours = lambda **options: (flows.jaxode_loss(max_steps=max_steps, **options), p.key, False)
    theirs = lambda **options: (flows.diffrax_loss(max_steps=max_steps, **options), p.probe, False)
    return {
        "jaxode": ours(),
        "jaxode per sample": ours(batch="per_sample"),
        "jaxode backsolve": ours(adjoint=jaxode.BacksolveAdjoint()),
        "diffrax checkpointed": theirs(),
        "diffrax vmap checkpointed": theirs(per_sample=True),
        "diffrax backsolve": theirs(adjoint=backsolve),
        "jax odeint": (flows.odeint_loss, p.probe, True),
    }


def temporary(p: FlowProblem, loss, noise, static: bool) -> int:
    return temporary_bytes(jax.value_and_grad(loss), p.params, p.x, noise, 1e-5, static=static)


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
            of_user, of_nn = (contenders(q, settings["max_steps"]) for q in (p, nn))
            calls = {name: (p, *choice) for name, choice in of_user.items()}
            calls["jaxode, jaxode.nn"] = (nn, *of_nn["jaxode"])
            for name, call in calls.items():
                size = attempt(bench, failed, name, lambda call=call: temporary(*call))
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

    def draw(self, results: Results) -> Figure:
        curves = {
            varied: {name: list(curve.items()) for name, curve in by_name.items()}
            for varied, by_name in self.mebibytes(results).items()
        }
        return show.curves(curves, "MiB")


BENCHMARK = Memory()
