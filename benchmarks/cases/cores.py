"""The training step with a device of JAX on each core, against a single device with all cores.

XLA runs a product of small matrices on one core, so a single device keeps other cores idle.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.cases.ffjord_step import SIZES
from benchmarks.harness.benchmark import Contest, WorkPrecision
from benchmarks.harness.machine import core_count
from benchmarks.harness.problems import FlowProblem, Workload, flow
from benchmarks.peers import flows

SINGLE = "jaxode, one device"


def device_count() -> int:
    """The largest power of two that has a core for each, so that it divides the batch."""
    return 2 ** min(core_count().bit_length() - 1, 6)


def mesh_of(count: int) -> Mesh:
    """So many devices on the CPU; `jax_num_cpu_devices` counts only before the first use of one."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return Mesh(np.array(jax.devices()), (flows.AXIS,))


def contenders(p: FlowProblem, mesh: Mesh) -> dict[str, Any]:
    q = flows.over_devices(p, mesh)

    def over_all(name: str, program: Any):
        # jaxode draws the noise itself.
        noise = q.key if name.startswith("jaxode") else q.probe

        def call(tolerance):
            loss, gradient = program(q.params, q.x, noise, tolerance)
            return loss, jax.tree.leaves(gradient)

        return lambda: call

    return {
        **{name: over_all(name, program) for name, program in flows.on_devices(mesh).items()},
        SINGLE: lambda: flows.jaxode_step(p),
        "diffrax, one device": lambda: flows.diffrax_step(p),
        "jax odeint, one device": lambda: flows.odeint_step(p),
    }


class Cores(WorkPrecision):
    title = "A device on each core of the CPU"
    cases = {
        "8 Gaussians, 512 x 2, 64-64-64": SIZES["8 Gaussians, 512 x 2, 64-64-64"],
        "512 x 8, 256-256": Workload(8, 512, (256, 256)),
        "64 x 8, 64-64": Workload(8, 64, (64, 64)),
    }
    target = 1e-3
    groups = {SINGLE: [SINGLE]}

    def contest(self, case: str) -> Contest:
        mesh = mesh_of(device_count())
        p = flow(self.cases[case])
        makers = contenders(p, mesh)
        return Contest(makers, lambda: flows.exact(p))


BENCHMARK = Cores()
