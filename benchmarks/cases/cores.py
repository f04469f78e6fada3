"""The training step with a device of JAX on each core, against a single device with all cores.

XLA runs a product of small matrices on one core, so a single device keeps other cores idle.
"""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.cases.ffjord_step import SIZES
from benchmarks.harness.benchmark import Contest, Result, Results, WorkPrecision
from benchmarks.harness.fairness import Bench
from benchmarks.harness.problems import FlowProblem, Workload, flow
from benchmarks.peers import flows

SINGLE = "jaxode, one device"


def device_count() -> int:
    """The largest power of two that has a core for each, so that it divides the batch."""
    return 2 ** min(len(os.sched_getaffinity(0)).bit_length() - 1, 6)


def mesh_of(count: int) -> Mesh:
    """So many devices on the CPU; `jax_num_cpu_devices` counts only before the first use of one."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return Mesh(np.array(jax.devices()), (flows.AXIS,))


def contenders(p: FlowProblem, mesh: Mesh) -> dict[str, Any]:
    q, split = flows.over_devices(p, mesh), P(flows.AXIS)

    def stepper(step, noise):
        def call(tolerance):
            loss, gradient = step(q.params, q.x, noise, tolerance)
            return loss, jax.tree.leaves(gradient)

        return call

    def own(**options):
        loss = flows.jaxode_loss(**options)
        return stepper(jax.jit(flows.shard_mapped(loss, mesh, P(), split, P(), P())), q.key)

    def odeint():
        def step(params, x, probe, tolerance):
            local = flows.at(tolerance, flows.odeint_loss)
            return flows.shard_mapped_untyped(local, mesh, P(), split, split)(params, x, probe)

        return stepper(jax.jit(step, static_argnums=3), q.probe)

    return {
        "jaxode": own,
        "jaxode, joint steps": lambda: own(axis_name=flows.AXIS),
        SINGLE: lambda: flows.jaxode_step(p),
        "diffrax, jit": lambda: stepper(flows.partitioned(flows.diffrax_loss(), mesh), q.probe),
        "diffrax, one device": lambda: flows.diffrax_step(p),
        "jax odeint, shard_map": odeint,
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

    def run(self, case: str, bench: Bench) -> Result:
        return {**super().run(case, bench), "devices": jax.device_count()}

    def sentence(self, results: Results) -> str:
        gains = "; ".join(
            f"{result['ratios'][SINGLE]:.2f}x on {result['devices']} devices ({case})"
            for case, result in results.items()
            if SINGLE in result["ratios"]
        )
        return (
            "Under `shard_map`, each device with its own steps, jaxode takes as a multiple of its "
            f"single-device time: {gains}. {super().sentence(results)}"
        )


BENCHMARK = Cores()
