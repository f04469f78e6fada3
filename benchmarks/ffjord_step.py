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
        "workload": flows.Workload(43, 1000, (860, 860)), "tolerances": LARGE, "closed_form": True,
    },
    "MINIBOONE's net, exact likelihood": {
        "workload": flows.Workload(43, 1000, (860, 860)), "tolerances": (1e-4,), "exact": True,
    },
    "overhead-bound, 64 x 8, 64-64": {
        "workload": flows.Workload(8, 64, (64, 64)), "tolerances": SMALL,
    },
    "the same over eight times the span": {
        "workload": flows.Workload(8, 64, (64, 64), span=8.0), "tolerances": SMALL,
    },
    "parameter-bound, 8 x 64, 1024-1024": {
        "workload": flows.Workload(64, 8, (1024, 1024)), "tolerances": LARGE,
    },
}  # fmt: skip
SECONDS = 30.0
TARGET = 1e-3  # the error of the gradient at which times are compared
RECURSIVE, BACKSOLVE = diffrax.RecursiveCheckpointAdjoint(), flows.seminorm_backsolve
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
    "torchdiffeq, FFJORD's recipe": ["torchdiffeq adjoint"],
    "torchdiffeq direct": ["torchdiffeq direct"],
    "zuko": ["zuko"],
    f"peers with {OWN}": [f"{name}, {OWN}" for name in PEERS_OF_THEIR_OWN],
}
CLOSED_FORM = "jaxode exact, closed form"


def in_torch():
    if jax.default_backend() != "cpu":
        raise ImportError("the peers in PyTorch are compared on CPUs only")
    from benchmarks import torch_flows

    return torch_flows


def run(case: str, bench: Bench) -> dict[str, Any]:
    settings = CASES[case]
    p = flows.problem(settings["workload"])
    if settings.get("exact"):
        return exact_likelihood(p, settings["tolerances"], bench)
    failed: dict[str, str] = {}
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
        "torchdiffeq direct": lambda: in_torch().torchdiffeq_step(p, adjoint=False),
        "zuko": lambda: in_torch().zuko_step(p),
    }
    bench.announce("reference")
    references = {"": flows.reference(p)}
    # Eight probes have another gradient: only their time at one tolerance is of interest.
    tolerances = {"": settings["tolerances"], "jaxode 8 probes": (1e-5,)}
    if settings.get("closed_form"):
        makers[CLOSED_FORM] = lambda: flows.jaxode_step(p, jaxode.divergence.closed_form())
        references[CLOSED_FORM] = flows.reference(p, closed_form)
    result = work_precision(bench, makers, references, tolerances, TARGET, GROUPS)
    result["failed"] |= failed
    add_ratios(result)
    return result


def exact_likelihood(p: flows.Problem, tolerances, bench: Bench) -> dict[str, Any]:
    """The closed form of jaxode against an exact trace of diffrax, which takes half a minute."""
    makers = {
        "jaxode": lambda: flows.jaxode_step(p, jaxode.divergence.closed_form()),
        "diffrax exact trace": lambda: flows.diffrax_step(
            p, diffrax.Tsit5(), RECURSIVE, field=flows.augmented_exact
        ),
    }
    bench.announce("reference")
    references = {"": flows.reference(p, closed_form)}
    groups = {"diffrax exact trace": ["diffrax exact trace"]}
    return work_precision(bench, makers, references, tolerances, TARGET, groups)


def closed_form(t, state, params, probe):
    del probe
    return jax.vmap(lambda z: jaxode.nn.field.value_and_divergence(t, z, params))(state[0])


def add_ratios(result: dict[str, Any]) -> None:
    """Of 8 probes to one at the same tolerance, and of the closed form to peers with one probe."""
    curves, ratios, at = result["curves"], result["ratios"], result["at_target"]
    if "jaxode 8 probes" in curves and "jaxode" in curves:
        eight = curves["jaxode 8 probes"][0]
        one = next(row for row in curves["jaxode"] if row["tolerance"] == eight["tolerance"])
        ratios["8 probes, one probe"] = eight["median"] / one["median"]
        del curves["jaxode 8 probes"], at["jaxode 8 probes"]
    peer = result["best"].get("best JAX peer")
    if CLOSED_FORM in at and peer:
        ratios[f"closed form, {peer} with one probe"] = (
            at[CLOSED_FORM]["median"] / at[peer]["median"]
        )


def table(cases: dict[str, Any]) -> str:
    return report.work_precision_tables(cases)


def draw(cases: dict[str, Any], path: str) -> None:
    report.draw_work_precision(cases, path, TITLE)


def sentence(cases: dict[str, Any]) -> str:
    return report.work_precision_sentence(cases)
