"""The training step of a flow: value and gradient of the negative log-likelihood.

Every flow is trained, and each size comes twice: with a network as users write it, and with one of
`jaxode.nn`, which all libraries get.
"""

import diffrax
import jax

from benchmarks.harness.benchmark import TOLERANCES, Contest, WorkPrecision
from benchmarks.harness.problems import OWN, Workload, flow
from benchmarks.peers import flows

SIZES = {
    "8 Gaussians, 512 x 2, 64-64-64": Workload(2, 512, (64, 64, 64)),
    "overhead-bound, 64 x 8, 64-64": Workload(8, 64, (64, 64)),
    "parameter-bound, 8 x 64, 1024-1024": Workload(64, 8, (1024, 1024), steps=800),
    "MINIBOONE's size, 1000 x 43, 860-860": Workload(43, 1000, (860, 860), steps=800),
}
LARGE = 256  # width of a layer from which on the loosest tolerance is left out
DIFFRAX = {
    f"diffrax {solver} {name}": (getattr(diffrax, solver)(), adjoint)
    for name, adjoint in (
        ("checkpointed", diffrax.RecursiveCheckpointAdjoint()),
        ("backsolve", flows.seminorm_backsolve),
    )
    for solver in ("Tsit5", "Dopri5")
}


def in_torch():
    if jax.default_backend() != "cpu":
        raise ImportError("the peers in PyTorch are compared on CPUs only")
    from benchmarks.peers import in_torch

    return in_torch


class FfjordStep(WorkPrecision):
    title = "Training step of a continuous normalizing flow"
    cases = {
        f"{size}, {OWN[own]}": workload._replace(own=own)
        for size, workload in SIZES.items()
        for own in (True, False)
    }
    target = 1e-3
    groups = {
        "diffrax": list(DIFFRAX),
        "jax odeint": ["jax odeint"],
        "torchdiffeq": ["torchdiffeq adjoint", "torchdiffeq direct"],
        "zuko": ["zuko"],
    }

    def contest(self, case: str) -> Contest:
        workload = self.cases[case]
        p = flow(workload)
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
        loosest = (1e-2,) if max(workload.widths) < LARGE else ()
        check = lambda: in_torch().check_networks(p)
        return Contest(makers, lambda: flows.exact(p), check, (*loosest, *TOLERANCES))


BENCHMARK = FfjordStep()
