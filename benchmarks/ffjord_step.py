"""The training step of a flow: value and gradient of the negative log-likelihood.

Every flow is trained, and each size comes twice: with a network as users write it, and with one of
`jaxode.nn`, which all libraries get.
"""

from typing import Any

import diffrax
import jax

from benchmarks import flows, report
from benchmarks.fairness import Bench, check_same, work_precision

TITLE = "Training step of a continuous normalizing flow"
SHORT = "flow"
SMALL = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
LARGE = (1e-3, 1e-4, 1e-5, 1e-6)
SIZES: dict[str, tuple[flows.Workload, tuple[float, ...]]] = {
    "8 Gaussians, 512 x 2, 64-64-64": (flows.Workload(2, 512, (64, 64, 64)), SMALL),
    "overhead-bound, 64 x 8, 64-64": (flows.Workload(8, 64, (64, 64)), SMALL),
    "parameter-bound, 8 x 64, 1024-1024": (flows.Workload(64, 8, (1024, 1024), steps=800), LARGE),
    "MINIBOONE's size, 1000 x 43, 860-860": (
        flows.Workload(43, 1000, (860, 860), steps=800),
        LARGE,
    ),
}
CASES = {
    f"{size}, {'a network of the user' if own else 'jaxode.nn'}": (
        workload._replace(own=own), tolerances
    )
    for size, (workload, tolerances) in SIZES.items()
    for own in (True, False)
}  # fmt: skip
TARGET = 1e-3  # the error of the gradient at which times are compared
RECURSIVE, BACKSOLVE = diffrax.RecursiveCheckpointAdjoint(), flows.seminorm_backsolve
DIFFRAX = {
    "diffrax Tsit5 checkpointed": (diffrax.Tsit5(), RECURSIVE),
    "diffrax Dopri5 checkpointed": (diffrax.Dopri5(), RECURSIVE),
    "diffrax Tsit5 backsolve": (diffrax.Tsit5(), BACKSOLVE),
    "diffrax Dopri5 backsolve": (diffrax.Dopri5(), BACKSOLVE),
}
GROUPS = {
    "diffrax": list(DIFFRAX),
    "jax odeint": ["jax odeint"],
    "torchdiffeq": ["torchdiffeq adjoint", "torchdiffeq direct"],
    "zuko": ["zuko"],
}


def in_torch():
    if jax.default_backend() != "cpu":
        raise ImportError("the peers in PyTorch are compared on CPUs only")
    from benchmarks import torch_flows

    return torch_flows


def run(case: str, bench: Bench) -> dict[str, Any]:
    workload, tolerances = CASES[case]
    p = flows.problem(workload)
    failed: dict[str, str] = {}
    check_same(failed, "the same network in PyTorch", lambda: in_torch().check_networks(p))
    makers = {
        "jaxode": lambda: flows.jaxode_step(p),
        **{
            name: lambda choice=choice: flows.diffrax_step(p, *choice)
            for name, choice in DIFFRAX.items()
        },
        "jax odeint": lambda: flows.odeint_step(p),
        "torchdiffeq adjoint": lambda: in_torch().torchdiffeq_step(p),
        "torchdiffeq direct": lambda: in_torch().torchdiffeq_step(p, adjoint=False),
        "zuko": lambda: in_torch().zuko_step(p),
    }
    bench.announce("reference")
    exact = flows.reference(p)
    result = work_precision(bench, makers, exact, tolerances, TARGET, GROUPS)
    result["failed"] |= failed
    return result


def table(cases: dict[str, Any]) -> str:
    return report.work_precision_tables(cases)


def draw(cases: dict[str, Any], path: str) -> None:
    report.draw_work_precision(cases, path, TITLE)


def sentence(cases: dict[str, Any]) -> str:
    return report.work_precision_sentence(cases)
