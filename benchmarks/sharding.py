"""What crosses between devices in a training step of a flow with a sharded batch.

Read from the compiled HLO on virtual CPU devices; nothing is timed. A collective inside a loop is
paid at every iteration: of the loop over steps at depth 1, of the loop over stages at depth 2.
Under `shard_map` each device takes its own steps, or with joint steps the same.
"""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks import flows, hlo, report
from benchmarks.fairness import Bench, attempt

TITLE = "What crosses between devices"
TIMED = False
CASES = {"1 device": 1, "2 devices": 2, "4 devices": 4, "8 devices": 8}
WORKLOAD = flows.Workload(8, 512, (256, 256))
TOLERANCE = 1e-5


def contenders(p: flows.Problem, mesh: Mesh) -> dict[str, Any]:
    """Compiled training steps."""
    p = flows.over_devices(p, mesh)

    def shard_mapped(loss):
        step = flows.shard_mapped(
            lambda *args: loss(*args, TOLERANCE), mesh, P(), P(flows.AXIS), P()
        )
        return jax.jit(step).lower(p.params, p.x, p.key)

    def shard_mapped_diffrax(loss):  # https://github.com/patrick-kidger/diffrax/issues/765
        split = P(flows.AXIS)
        step = flows.shard_mapped_untyped(
            lambda *args: loss(*args, TOLERANCE), mesh, P(), split, split
        )
        return jax.jit(step).lower(p.params, p.x, p.probe)

    def partitioned(loss, noise):
        return flows.partitioned(loss, mesh).lower(p.params, p.x, noise, TOLERANCE)

    adjoint = diffrax.RecursiveCheckpointAdjoint()
    diffrax_loss = flows.diffrax_loss(p, diffrax.Tsit5(), adjoint)
    own, joint = flows.jaxode_loss(p), flows.jaxode_loss(p, axis_name=flows.AXIS)
    return {
        "jaxode, shard_map": lambda: shard_mapped(own),
        "jaxode, shard_map, joint steps": lambda: shard_mapped(joint),
        "diffrax, shard_map": lambda: shard_mapped_diffrax(diffrax_loss),
        "jaxode, jit": lambda: partitioned(own, p.key),
        "diffrax, jit": lambda: partitioned(diffrax_loss, p.probe),
    }


def run(case: str, bench: Bench) -> dict[str, Any]:
    # `jax_num_cpu_devices` counts only before the first use of a device.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", CASES[case])
    mesh = Mesh(np.array(jax.devices()), (flows.AXIS,))
    shape = (WORKLOAD.batch, WORKLOAD.dim)
    blank = jnp.zeros(shape)
    p = flows.Problem(flows.network(WORKLOAD), blank, blank, jax.random.key(0))
    failed: dict[str, str] = {}
    found = {}
    for name, lower in contenders(p, mesh).items():
        text = attempt(bench, failed, name, lambda lower=lower: lower().compile().as_text())
        if text is not None:
            found[name] = [c for c in hlo.collectives(text) if CASES[case] > 1]
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(p.params))
    return {"failed": failed, "collectives": found, "parameter_bytes": parameters}


def in_loops(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [c for c in found if c["depth"] > 0]


def table(cases: dict[str, Any]) -> str:
    rows = []
    for case, result in cases.items():
        for name, found in result["collectives"].items():
            outside = [c for c in found if c["depth"] == 0]
            rows.append(
                [case, name]
                + [f"{len(part)}, {sum(c['bytes'] for c in part):,} bytes"
                   for part in (outside, in_loops(found))]
            )  # fmt: skip
    header = ["", "", "once a training step", "at every iteration of a loop"]
    failed = "".join(dict.fromkeys(report.failures(result) for result in cases.values()))
    return f"{report.markdown(header, rows)}\n\n{on_paper(cases)}{failed}"


STEPS, STAGES = 10, 6  # of a backward solve, for the figures on paper


def crossing(found: list[dict[str, Any]], devices: int) -> float:
    """Bytes that each device sends in a training step, all collectives as rings."""
    trips = {0: 1, 1: STEPS}
    return sum(
        2 * (devices - 1) / devices * c["bytes"] * trips.get(c["depth"], STEPS * STAGES)
        for c in found
    )


def on_paper(cases: dict[str, Any]) -> str:
    last = list(cases.values())[-1]
    parts = [
        f"{name}: {crossing(found, 8) / 2**20:.1f} MiB on 8 and "
        f"{crossing(found, 256) / 2**20:.1f} MiB on 256, in {sum_trips(found)} collectives"
        for name, found in last["collectives"].items()
    ]
    return (
        f"On paper, a device sends in a training step with {STEPS} steps of {STAGES} stages, by "
        f"ring all-reduce ({last['parameter_bytes'] / 2**20:.1f} MiB of parameters): "
        + "; ".join(parts) + "."
    )  # fmt: skip


def sum_trips(found: list[dict[str, Any]]) -> int:
    return sum({0: 1, 1: STEPS}.get(c["depth"], STEPS * STAGES) for c in found)


def draw(cases: dict[str, Any], path: str) -> None:
    last, result = list(cases.items())[-1]
    bars = {
        f"sent by a device in a training step on {n} devices": {
            name: crossing(found, n) / 2**20 for name, found in result["collectives"].items()
        }
        for n in (8, 256)
    }
    report.draw_bars(bars, path, f"{TITLE} (program for {last})", "MiB")


def sentence(cases: dict[str, Any]) -> str:
    last, result = list(cases.items())[-1]
    parts = []
    for name, found in result["collectives"].items():
        loops = in_loops(found)
        parts.append(
            f"{name} has {len(loops)} collectives of {sum(c['bytes'] for c in loops):,} bytes "
            f"inside loops"
        )
    return f"On {last}, " + "; ".join(parts) + "."
