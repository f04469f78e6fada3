"""Temporary memory of a training step, as the compiler allots it, against what it could grow with.

Nothing runs: `memory_analysis()` of the compiled value and gradient of the likelihood.
"""

from collections.abc import Iterator
from typing import Any

import diffrax
import equinox as eqx
import jax

import jaxode
from benchmarks.harness import show
from benchmarks.harness.benchmark import Growth, Point, Result, Results
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


class Memory(Growth):
    title = "Temporary memory of a training step"
    timed = False
    base = {"max_steps": 4096, "width": 64, "batch": 64, "dim": 8}
    cases = {"max_steps": (256, 65536), "width": (64, 1024), "batch": (64, 4096), "dim": (8, 512)}
    unit = heading = "MiB"
    labels = {"width": "parameters"}

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

    def point(self, row: list[float]) -> Point:
        return Point(row[0], row[1] / 2**20, f"{row[1] / 2**20:.2f}")

    def told(self, results: Results) -> Iterator[str]:
        """Growth over the whole range, and the ratio to the smallest peer at both ends."""
        for case, result in results.items():
            mine = dict(result["curves"]["jaxode"])
            peers = [dict(result["curves"][name]) for name in show.peers(result["curves"])]
            ends = start, end = min(mine), max(mine)
            first, last = (mine[x] / min(peer[x] for peer in peers if x in peer) for x in ends)
            yield (
                f"from {start} to {end} {self.labels.get(case, case)}, jaxode's memory grows "
                f"{mine[end] / mine[start]:.1f}-fold, from {first:.2f}x to {last:.2f}x as much as "
                "the smallest JAX peer"
            )


BENCHMARK = Memory()
