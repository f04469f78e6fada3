"""The training step with a device of JAX on each core, against a single device with all cores.

XLA runs a product of small matrices on one core, so a single device keeps other cores idle.
"""

import os
from typing import Any

import diffrax
import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks import flows, report
from benchmarks.fairness import Bench, work_precision
from benchmarks.ffjord_step import TARGET

TITLE = "A device on each core of the CPU"
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)
CASES = {
    "8 Gaussians, 512 x 2, 64-64-64": flows.Workload(2, 512, (64, 64, 64)),
    "512 x 8, 256-256": flows.Workload(8, 512, (256, 256)),
    "64 x 8, 64-64": flows.Workload(8, 64, (64, 64)),
}
ADJOINT = diffrax.RecursiveCheckpointAdjoint()
SINGLE = "jaxode, one device"


def device_count() -> int:
    """The largest power of two that has a core for each, so that it divides the batch."""
    return 2 ** min(len(os.sched_getaffinity(0)).bit_length() - 1, 6)


def contenders(p: flows.Problem, mesh: Mesh) -> dict[str, Any]:
    q, split = flows.over_devices(p, mesh), P(flows.AXIS)

    def stepper(step, noise):
        def call(tolerance):
            loss, gradient = step(q.params, q.x, noise, tolerance)
            return loss, jax.tree.leaves(gradient)

        return call

    def own(**options):
        loss = flows.jaxode_loss(p, **options)
        return stepper(jax.jit(flows.shard_mapped(loss, mesh, P(), split, P(), P())), q.key)

    def odeint():
        loss = flows.odeint_loss(p)

        def step(params, x, probe, tolerance):
            local = lambda *args: loss(*args, tolerance)
            return flows.shard_mapped_untyped(local, mesh, P(), split, split)(params, x, probe)

        return stepper(jax.jit(step, static_argnums=3), q.probe)

    diffrax_loss = flows.diffrax_loss(p, diffrax.Tsit5(), ADJOINT)
    return {
        "jaxode": own,
        "jaxode, joint steps": lambda: own(axis_name=flows.AXIS),
        SINGLE: lambda: flows.jaxode_step(p),
        "diffrax, jit": lambda: stepper(flows.partitioned(diffrax_loss, mesh), q.probe),
        "diffrax, one device": lambda: flows.diffrax_step(p, diffrax.Tsit5(), ADJOINT),
        "jax odeint, shard_map": odeint,
        "jax odeint, one device": lambda: flows.odeint_step(p),
    }


def run(case: str, bench: Bench) -> dict[str, Any]:
    # `jax_num_cpu_devices` counts only before the first use of a device.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", device_count())
    mesh = Mesh(np.array(jax.devices()), (flows.AXIS,))
    p = flows.problem(CASES[case])
    bench.announce("reference")
    exact = flows.reference(p)
    groups = {SINGLE: [SINGLE]}
    result = work_precision(bench, contenders(p, mesh), exact, TOLERANCES, TARGET, groups)
    return {**result, "devices": mesh.size}


def table(cases: dict[str, Any]) -> str:
    return report.work_precision_tables(cases)


def draw(cases: dict[str, Any], path: str) -> None:
    report.draw_work_precision(cases, path, TITLE)


def sentence(cases: dict[str, Any]) -> str:
    gains = "; ".join(
        f"{result['ratios'][SINGLE]:.2f}x on {result['devices']} devices ({case})"
        for case, result in cases.items()
        if SINGLE in result["ratios"]
    )
    return (
        "Under `shard_map`, each device with its own steps, jaxode takes as a multiple of its "
        f"single-device time: {gains}. {report.work_precision_sentence(cases)}"
    )
