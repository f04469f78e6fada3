"""The training step with a device of JAX on each core, against a single device with all cores.

XLA runs a product of small matrices on one core, so a single device keeps most of the others idle.
"""

import os
from typing import Any

import diffrax
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import flows, report
from benchmarks.fairness import Bench, work_precision
from benchmarks.ffjord_step import TARGET

TITLE = "A device on each core"
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)
CASES = {
    "8 Gaussians, 512 x 2, 64-64-64": flows.Workload(2, 512, (64, 64, 64), trained=True),
    "512 x 8, 256-256": flows.Workload(8, 512, (256, 256)),
    "64 x 8, 64-64": flows.Workload(8, 64, (64, 64)),
}
SECONDS = 20.0
AXIS = "batch"
ADJOINT = diffrax.RecursiveCheckpointAdjoint()


def devices() -> int:
    """One a core, and so many that they divide a batch of 64."""
    return 2 ** min(len(os.sched_getaffinity(0)).bit_length() - 1, 6)


def shard_mapped(p: flows.Problem, mesh: Mesh, **options) -> Any:
    loss = flows.jaxode_loss(p, **options)

    def mean(params, x, key, tolerance):
        return jax.lax.pmean(loss(params, x, key, tolerance), AXIS)

    specs = (P(), P(AXIS), P(), P())
    return stepper(
        jax.shard_map(jax.value_and_grad(mean), mesh=mesh, in_specs=specs, out_specs=P()), p, p.key
    )


def shard_mapped_odeint(p: flows.Problem, mesh: Mesh) -> Any:
    # With the types of `shard_map` it fails: its loops mix what varies with what does not.
    step = jax.value_and_grad(flows.odeint_loss(p))

    def sharded(params, x, probe, tolerance):
        local = lambda *args: jax.lax.pmean(step(*args, tolerance), AXIS)
        specs = (P(), P(AXIS), P(AXIS))
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
        return mapped(params, x, probe)

    return stepper(sharded, p, p.probe, static_argnums=3)


def partitioned(p: flows.Problem, mesh: Mesh, loss) -> Any:
    """By `jit`, of a batch that is split over the devices."""
    q = p._replace(
        params=jax.device_put(p.params, NamedSharding(mesh, P())),
        x=jax.device_put(p.x, NamedSharding(mesh, P(AXIS))),
    )
    probe = jax.device_put(p.probe, NamedSharding(mesh, P(AXIS)))
    return stepper(jax.value_and_grad(loss), q, probe)


def stepper(function, p: flows.Problem, noise, **options) -> Any:
    step = jax.jit(function, **options)

    def call(tolerance):
        loss, gradient = step(p.params, p.x, noise, tolerance)
        return loss, jax.tree.leaves(gradient)

    return call


def run(case: str, bench: Bench) -> dict[str, Any]:
    # `jax_num_cpu_devices` counts only before the first use of a device.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices())
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    p = flows.problem(CASES[case])
    diffrax_loss = flows.diffrax_loss(p, diffrax.Tsit5(), ADJOINT)
    makers = {
        "jaxode": lambda: shard_mapped(p, mesh),
        "jaxode, joint steps": lambda: shard_mapped(p, mesh, axis_name=AXIS),
        "jaxode, one device": lambda: flows.jaxode_step(p),
        "diffrax, jit": lambda: partitioned(p, mesh, diffrax_loss),
        "diffrax, one device": lambda: flows.diffrax_step(p, diffrax.Tsit5(), ADJOINT),
        "jax odeint, shard_map": lambda: shard_mapped_odeint(p, mesh),
        "jax odeint, one device": lambda: flows.odeint_step(p),
    }
    bench.announce("reference")
    references = {"": flows.reference(p)}
    groups = {"jaxode, one device": ["jaxode, one device"]}
    result = work_precision(bench, makers, references, TOLERANCES, TARGET, groups)
    return {**result, "devices": devices()}


def table(cases: dict[str, Any]) -> str:
    counts = sorted({result["devices"] for result in cases.values()})
    return (
        f"On {' or '.join(map(str, counts))} devices; jaxode under `shard_map`, each device with "
        f"its own steps.\n\n{report.work_precision_tables(cases)}"
    )


def draw(cases: dict[str, Any], path: str) -> None:
    report.draw_work_precision(cases, path, TITLE)


def sentence(cases: dict[str, Any]) -> str:
    gains = "; ".join(
        f"{result['ratios']['jaxode, one device']:.2f} ({case})" for case, result in cases.items()
    )
    return (
        f"jaxode takes, of its own time on a single device, {gains}. "
        + report.work_precision_sentence(cases)
    )  # fmt: skip
