"""The training step of a flow: value and gradient of the negative log-likelihood."""

from typing import Any

import diffrax
import jax

import jaxode
from benchmarks import flows, report
from benchmarks.fairness import Bench, check_same, work_precision

TITLE = "Training step of a continuous normalizing flow"
SMALL = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
LARGE = (1e-3, 1e-4, 1e-5)
CASES: dict[str, dict[str, Any]] = {
    "8 Gaussians, 512 x 2, 64-64-64": {
        "workload": flows.Workload(2, 512, (64, 64, 64), trained=True), "tolerances": SMALL,
    },
    "MINIBOONE's net, 1000 x 43, 860-860": {
        "workload": flows.Workload(43, 1000, (860, 860)), "tolerances": LARGE, "exact": True,
    },
    "overhead-bound, 64 x 8, 64-64": {
        "workload": flows.Workload(8, 64, (64, 64)), "tolerances": SMALL,
    },
    "parameter-bound, 8 x 64, 1024-1024": {
        "workload": flows.Workload(64, 8, (1024, 1024)), "tolerances": LARGE,
    },
}  # fmt: skip
TARGET = 1e-3  # the error of the gradient at which times are compared
RECURSIVE, BACKSOLVE = diffrax.RecursiveCheckpointAdjoint(), diffrax.BacksolveAdjoint()
DIFFRAX = {
    "diffrax Tsit5 checkpointed": (diffrax.Tsit5(), RECURSIVE),
    "diffrax Dopri5 checkpointed": (diffrax.Dopri5(), RECURSIVE),
    "diffrax Tsit5 backsolve": (diffrax.Tsit5(), BACKSOLVE),
    "diffrax Dopri5 backsolve": (diffrax.Dopri5(), BACKSOLVE),
}
# All get the network of jaxode.nn with its softplus; what most people write is jax.nn.softplus.
OWN = "jax.nn.softplus"
PEERS_OF_THEIR_OWN = {
    "diffrax Tsit5 checkpointed": lambda p: flows.diffrax_step(p, diffrax.Tsit5(), RECURSIVE),
    "jax odeint": flows.odeint_step,
}
GROUPS = {
    "best of diffrax": list(DIFFRAX),
    "jax odeint": ["jax odeint"],
    "best JAX peer": [*DIFFRAX, "jax odeint"],
    "torchdiffeq": ["torchdiffeq adjoint"],
    "zuko": ["zuko"],
    f"peers with {OWN}": [f"{name}, {OWN}" for name in PEERS_OF_THEIR_OWN],
}
CLOSED_FORM, EXACT_PEER = "jaxode exact, closed form", "diffrax Tsit5 exact trace"


def in_torch():
    from benchmarks import torch_flows

    return torch_flows


def run(case: str, bench: Bench) -> dict[str, Any]:
    settings = CASES[case]
    p, failed = flows.problem(settings["workload"]), {}
    own = p._replace(params=flows.network(settings["workload"], jax.nn.softplus))
    check_same(failed, "the same network in PyTorch", lambda: in_torch().check_networks(p))
    makers = {
        "jaxode": lambda: flows.jaxode_step(p),
        "jaxode 8 probes": lambda: flows.jaxode_step(p, jaxode.divergence.hutchinson(8)),
        **{
            name: lambda choice=choice: flows.diffrax_step(p, *choice)
            for name, choice in DIFFRAX.items()
        },
        "jax odeint": lambda: flows.odeint_step(p),
        **{
            f"{name}, {OWN}": lambda step=step: step(own)
            for name, step in PEERS_OF_THEIR_OWN.items()
        },
        "torchdiffeq adjoint": lambda: in_torch().torchdiffeq_step(p),
        "zuko": lambda: in_torch().zuko_step(p),
    }
    bench.announce("reference")
    references = {"": flows.reference(p)}
    # Eight probes have another gradient: only their time at one tolerance is of interest.
    tolerances = {"": settings["tolerances"], "jaxode 8 probes": (1e-5,)}
    if settings.get("exact") and hasattr(jaxode.nn.field, "value_and_divergence"):
        auto = jaxode.divergence.auto()
        makers[CLOSED_FORM] = lambda: flows.jaxode_step(p, auto)
        makers[EXACT_PEER] = lambda: flows.diffrax_step(
            p, diffrax.Tsit5(), RECURSIVE, field=flows.augmented_exact
        )
        references[CLOSED_FORM] = references[EXACT_PEER] = flows.reference(p, closed_form)
        tolerances[EXACT_PEER] = (1e-4,)
    result = work_precision(bench, makers, references, tolerances, TARGET, GROUPS)
    result["failed"] |= failed
    add_ratios(result)
    return result


def closed_form(t, state, params, probe):
    del probe
    return jax.vmap(lambda z: jaxode.nn.field.value_and_divergence(t, z, params))(state[0])


def add_ratios(result: dict[str, Any]) -> None:
    """Of 8 probes to one, at the same tolerance."""
    curves, ratios = result["curves"], result["ratios"]
    if "jaxode 8 probes" in curves and "jaxode" in curves:
        eight = curves["jaxode 8 probes"][0]
        one = next(row for row in curves["jaxode"] if row["tolerance"] == eight["tolerance"])
        ratios["8 probes, one probe"] = eight["median"] / one["median"]
        del curves["jaxode 8 probes"], result["at_target"]["jaxode 8 probes"]


def table(cases: dict[str, Any]) -> str:
    return report.work_precision_tables(cases)


def draw(cases: dict[str, Any], path: str) -> None:
    report.draw_work_precision(cases, path, TITLE)


def sentence(cases: dict[str, Any]) -> str:
    return report.work_precision_sentence(cases)
