"""The training step of a Neural ODE: value and gradient of a loss on the states at given times.

The network is trained, and each size comes twice: as users write it, and as one of `jaxode.nn`.
"""

from jax.experimental.ode import odeint

import jaxode
from benchmarks.cases.ffjord_step import in_torch
from benchmarks.harness.benchmark import TOLERANCES, Contest, WorkPrecision
from benchmarks.harness.problems import OWN, neural_ode
from benchmarks.peers import odes
from benchmarks.peers.flows import seminorm_backsolve

SIZES: dict[str, dict[str, int]] = {
    "64-64, state 4, batch 256, 20 times": {"state": 4, "width": 64, "batch": 256, "times": 20},
    "64-64, state 64, batch 256, 20 times": {"state": 64, "width": 64, "batch": 256, "times": 20},
    "1024-1024, state 64, batch 8, 1 time": {"state": 64, "width": 1024, "batch": 8, "times": 1},
}


class NeuralOdeStep(WorkPrecision):
    title = "Training step of a Neural ODE"
    cases = {
        f"{size}, {OWN[own]}": {**settings, "own": own}
        for size, settings in SIZES.items()
        for own in (True, False)
    }
    target = 1e-4
    groups = {
        "diffrax": ["diffrax checkpointed", "diffrax backsolve"],
        "jax odeint": ["jax odeint"],
        "torchdiffeq": ["torchdiffeq adjoint", "torchdiffeq direct"],
    }

    def contest(self, case: str) -> Contest:
        p = neural_ode(**self.cases[case])
        makers = {
            "jaxode": lambda: odes.jaxode_step(p),
            "jaxode backsolve": lambda: odes.jaxode_step(p, jaxode.BacksolveAdjoint()),
            "jaxode.odeint": lambda: odes.odeint_step(p, jaxode.odeint),
            "diffrax checkpointed": lambda: odes.diffrax_step(p),
            "diffrax backsolve": lambda: odes.diffrax_step(p, seminorm_backsolve),
            "jax odeint": lambda: odes.odeint_step(p, odeint),
            "torchdiffeq adjoint": lambda: in_torch().torchdiffeq_ode_step(p),
            "torchdiffeq direct": lambda: in_torch().torchdiffeq_ode_step(p, adjoint=False),
        }
        check = lambda: in_torch().check_fields(p)
        return Contest(makers, lambda: odes.exact(p), check, (*TOLERANCES, 1e-7))


BENCHMARK = NeuralOdeStep()
