"""Temporary memory of a training step, as the compiler allots it, against what it could grow with.

Nothing runs: `memory_analysis()` of the compiled value and gradient of the likelihood.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

import jaxode
from benchmarks import flows, report
from benchmarks.fairness import Bench, attempt

TITLE = "Temporary memory of a training step"
TIMED = False
BASE = {"max_steps": 4096, "width": 64, "batch": 64, "dim": 8}
CASES: dict[str, tuple[int, ...]] = {  # what varies, the rest as in BASE
    "max_steps": (256, 65536),
    "width": (64, 1024),
    "batch": (64, 4096),
    "dim": (8, 512),
}


def contenders(p: flows.Problem, max_steps: int) -> dict[str, tuple[Any, Any, bool]]:
    """The loss, its noise, and whether its tolerance is known to the compiler."""
    checkpointed, backsolve = diffrax.RecursiveCheckpointAdjoint(), diffrax.BacksolveAdjoint()
    jaxode_loss = lambda **options: flows.jaxode_loss(p, max_steps=max_steps, **options)
    diffrax_loss = lambda adjoint, **options: flows.diffrax_loss(
        p, diffrax.Tsit5(), adjoint, max_steps=max_steps, **options
    )
    return {
        "jaxode": (jaxode_loss(), p.key, False),
        "jaxode per sample": (jaxode_loss(batch="per_sample"), p.key, False),
        "jaxode backsolve": (jaxode_loss(adjoint=jaxode.BacksolveAdjoint()), p.key, False),
        "diffrax checkpointed": (diffrax_loss(checkpointed), p.probe, False),
        "diffrax vmap checkpointed": (diffrax_loss(checkpointed, per_sample=True), p.probe, False),
        "diffrax backsolve": (diffrax_loss(backsolve), p.probe, False),
        "jax odeint": (flows.odeint_loss(p), p.probe, True),
    }


def temporary(p: flows.Problem, loss, noise, static: bool) -> int:
    """Bytes."""
    step = jax.jit(jax.value_and_grad(loss), static_argnums=3 if static else ())
    compiled = step.lower(p.params, p.x, noise, 1e-5).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotImplementedError("this backend does not analyze memory")
    return int(analysis.temp_size_in_bytes)


def untrained(workload: flows.Workload) -> flows.Problem:
    """What the compiler allots does not depend on the numbers."""
    blank = jnp.zeros((workload.batch, workload.dim))
    return flows.Problem(flows.network(workload), blank, blank, jax.random.key(0))


def run(case: str, bench: Bench) -> dict[str, Any]:
    failed: dict[str, str] = {}
    curves: dict[str, list[list[float]]] = {}
    for value in CASES[case]:
        settings = BASE | {case: value}
        size = settings["dim"], settings["batch"], 2 * (settings["width"],)
        p, nn = (untrained(flows.Workload(*size, own=own)) for own in (True, False))
        at = value
        if case == "width":  # what matters is the number of parameters
            at = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(p.params, eqx.is_array)))
        calls = {
            name: lambda choice=choice, p=p: temporary(p, *choice)
            for name, choice in contenders(p, settings["max_steps"]).items()
        }
        of_nn = contenders(nn, settings["max_steps"])["jaxode"]
        calls["jaxode, jaxode.nn"] = lambda nn=nn, of_nn=of_nn: temporary(nn, *of_nn)
        for name, call in calls.items():
            size = attempt(bench, failed, name, call)
            if size is not None:
                curves.setdefault(name, []).append([at, size])
    mine, peers = curves["jaxode"][-1][1], [n for n in curves if not n.startswith("jaxode")]
    ratios = {f"memory, {peer}": mine / curves[peer][-1][1] for peer in peers}
    return {"failed": failed, "curves": curves, "ratios": ratios}


LABELS = {"width": "parameters"}


def table(cases: dict[str, Any]) -> str:
    parts = []
    for case, result in cases.items():
        label = LABELS.get(case, case)
        values = [point[0] for point in result["curves"]["jaxode"]]
        header = ["MiB", *(f"{label} {value}" for value in values)]
        size = lambda curve, value: f"{curve[value] / 2**20:.2f}" if value in curve else ""
        rows = [
            [name, *(size(dict(curve), value) for value in values)]
            for name, curve in result["curves"].items()
        ]
        parts.append(report.markdown(header, rows) + report.failures(result))
    return "\n\n".join(parts)


def draw(cases: dict[str, Any], path: str) -> None:
    panels = {
        LABELS.get(case, case): {
            name: [(x, size / 2**20) for x, size in curve]
            for name, curve in result["curves"].items()
        }
        for case, result in cases.items()
    }
    report.draw_curves(panels, path, TITLE, "MiB")


def sentence(cases: dict[str, Any]) -> str:
    """Growth over the whole range, and the ratio to the smallest peer at both ends."""
    parts = []
    for case, result in cases.items():
        mine = dict(result["curves"]["jaxode"])
        peers = [dict(c) for n, c in result["curves"].items() if not n.startswith("jaxode")]
        start, end = min(mine), max(mine)
        first, last = (mine[x] / min(peer[x] for peer in peers if x in peer) for x in (start, end))
        parts.append(
            f"from {start} to {end} {LABELS.get(case, case)}, jaxode's memory grows "
            f"{mine[end] / mine[start]:.1f}-fold, from {first:.2f}x to {last:.2f}x as much as the "
            "smallest JAX peer"
        )
    return "; ".join(parts) + "."
