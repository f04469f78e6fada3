"""What the training step of a flow becomes on accelerators, compiled without one.

    make bench-accelerators

`libtpu` and the CUDA plugin of JAX compile for the description of a device. Nothing runs, so there
are no times, but kernels and products of matrices, the cycles that XLA estimates for a TPU,
temporary memory, what crosses between chips, and the time to compile. Several chips have a whole
batch of the workload each. Writes benchmarks/results/accelerators.json and the tables of
docs/devices.md.

An interrupted run continues with the next case; `--fresh` compiles all again.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import __main__ as runner
from benchmarks import flows, hlo, report
from benchmarks.fairness import Bench, attempt

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "accelerators.json"
PAGE = ROOT / "docs" / "devices.md"
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "diffrax", "equinox")
TOLERANCE = 1e-5
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_block_limit: 65536 registers_per_core_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    platform: str
    topology: str
    chips: int = 1


TARGETS = {
    "TPU v5e": Target("tpu", "v5e:2x2"),
    "H100": Target("cuda", "1x1x1"),
    "4 TPU v5e": Target("tpu", "v5e:2x2", 4),
    "256 TPU v5e": Target("tpu", "v5e:16x16", 256),
}
WORKLOADS = {
    "512 x 2, 64-64-64": flows.Workload(2, 512, (64, 64, 64)),
    "1000 x 43, 860-860": flows.Workload(43, 1000, (860, 860)),
}
CASES = {
    f"{target}, {workload}": (target, workload) for target in TARGETS for workload in WORKLOADS
}
# Nobody can be asked where in a network of TPUs this is, and no kernels can be timed to choose one.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
}  # fmt: skip


class Contender(NamedTuple):
    step: Callable[..., Any]
    """Value and gradient as a function of the parameters, the samples and the noise."""
    noise: Any
    backward: tuple[int, ...]
    """How often the loops inside of the one over the steps run on the way back from a step."""
    once: tuple[int, ...] = ()
    """The same for loops that are not over steps."""
    precision: str | None = None
    """Of products, if it is not the library's own."""


FORWARD = (6,)  # evaluations in a step of Dormand and Prince, or of Tsitouras
# Steps taken again from a checkpoint (none if their stages are kept), and stages pulled back, less
# the one that is a node of the quadrature. Where kernels are what costs, the nodes have no loop: a
# batch, and that one.
JAXODE = {"512 x 2, 64-64-64": (0, 5), "1000 x 43, 860-860": (0, 3, 5)}
FIRST_STEP = (2,)  # slopes that choose its size
DIFFRAX = (6, 6)  # stages evaluated again, and pulled back
ODEINT = (6,)  # stages of a step of the adjoint ODE, which has its own steps


def contenders(p: flows.Problem, mesh: Mesh, trips) -> dict[str, Contender]:
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    of_diffrax = at_tolerance(flows.diffrax_loss(p, diffrax.Tsit5(), adjoint))
    by_diffrax = Contender(jax.value_and_grad(of_diffrax), p.probe, DIFFRAX)
    ours, of_odeint = at_tolerance(flows.jaxode_loss(p)), at_tolerance(flows.odeint_loss(p))
    if mesh.size == 1:
        by_jaxode = Contender(jax.value_and_grad(ours), p.key, trips, FIRST_STEP)
        by_odeint = Contender(jax.value_and_grad(of_odeint), p.probe, ODEINT)
        return {
            "jaxode": by_jaxode,
            "jaxode, default": by_jaxode._replace(precision="default"),
            "diffrax": by_diffrax,
            "diffrax, highest": by_diffrax._replace(precision="highest"),
            "jax odeint": by_odeint,
            "jax odeint, highest": by_odeint._replace(precision="highest"),
        }
    rows, everywhere = P(flows.AXIS), P()
    joint = at_tolerance(flows.jaxode_loss(p, axis_name=flows.AXIS))
    mapped = lambda loss: Contender(
        flows.shard_mapped(loss, mesh, everywhere, rows, everywhere), p.key, trips, FIRST_STEP
    )
    untyped = flows.shard_mapped_untyped(of_odeint, mesh, everywhere, rows, rows)
    return {
        "jaxode, shard_map": mapped(ours),
        "jaxode, shard_map, joint steps": mapped(joint),
        "diffrax, jit": by_diffrax,  # https://github.com/patrick-kidger/diffrax/issues/765
        "jax odeint, shard_map": Contender(untyped, p.probe, ODEINT),
    }


def at_tolerance(loss):
    return lambda *args: loss(*args, TOLERANCE)


def mesh_of(target: Target) -> Mesh:
    options: dict[str, Any] = {}
    if target.platform == "cuda":
        options = {"target_config": H100, "topology": target.topology}
    described = topologies.get_topology_desc(target.topology, target.platform, **options)
    return Mesh(np.array(described.devices[: target.chips]), (flows.AXIS,))


def shapes(workload: flows.Workload, mesh: Mesh) -> flows.Problem:
    """Shapes in place of arrays, with a whole batch for each chip."""
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(flows.AXIS))
    placed = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)
    make = lambda: (flows.network(workload), jax.random.key(0))
    params, key = jax.tree.map(placed, jax.eval_shape(make))
    rows = mesh.size * workload.batch
    x = jax.ShapeDtypeStruct((rows, workload.dim), jnp.float32, sharding=split)
    return flows.Problem(params, x, x, key)


def compiled(contender: Contender, p: flows.Problem, platform: str) -> dict[str, Any]:
    precision, started = contender.precision, time.perf_counter()
    # A process on such a machine has it as its backend, by which jaxode chooses how to go back.
    backend = "gpu" if platform == "cuda" else platform
    at = jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()
    with mock.patch.object(jax, "default_backend", return_value=backend), at:
        traced = jax.jit(contender.step).trace(p.params, p.x, contender.noise)
    program = traced.lower(lowering_platforms=(platform,)).compile()
    seconds = time.perf_counter() - started
    return {
        **described(hlo.read(program.as_text()), contender),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }


def described(program: hlo.Loop, contender: Contender) -> dict[str, Any]:
    """Work in a step forward and back, and once a training step; where chips meet."""
    # A loop over steps has loops in it.
    over_steps = [loop for loop in program.loops if loop.loops]
    if len(over_steps) != 2:
        raise ValueError(f"a solve and its reverse are two loops over steps; got {len(over_steps)}")
    ahead, back = over_steps
    once = hlo.Loop(own=program.own, loops=[x for x in program.loops if not x.loops])
    return {
        "forward": ahead.trip(*FORWARD)._asdict(),
        "backward": back.trip(*contender.backward)._asdict(),
        "once": once.trip(*contender.once)._asdict(),
        "collectives": program.collectives,
    }


def run(case: str, bench: Bench) -> dict[str, Any]:
    # What is compiled for is only described: this process runs on the CPU.
    jax.config.update("jax_platforms", "cpu")
    target, workload = CASES[case]
    platform = TARGETS[target].platform
    mesh = mesh_of(TARGETS[target])
    p = shapes(WORKLOADS[workload], mesh)
    failed: dict[str, str] = {}
    found = {}
    for name, contender in contenders(p, mesh, JAXODE[workload]).items():
        call = lambda contender=contender: compiled(contender, p, platform)
        program = attempt(bench, failed, name, call)
        if program is not None:
            found[name] = program
    return {"failed": failed, "programs": found}


def tables(results: dict) -> list[str]:
    """Work on one device, and its ratios to the work of peers; then what crosses between chips."""
    alone = [target for target in TARGETS if TARGETS[target].chips == 1]
    return [*(table(results, target) for target in alone), ratios(results), crossing(results)]


def programs(results: dict, chosen: Callable[[Target], bool]):
    """`(target, workload, contender, program)` of all that compiled."""
    for case, (target, workload) in CASES.items():
        if chosen(TARGETS[target]):
            for name, program in results["cases"].get(case, {}).get("programs", {}).items():
                yield target, workload, name, program


def table(results: dict, target: str) -> str:
    rows = []
    for _, workload, name, program in programs(results, lambda each: each == TARGETS[target]):
        parts = [program[part] for part in ("forward", "backward", "once")]
        cycles = [" / ".join(f"{part['cycles'] / 1e3:,.0f}k" for part in parts)]
        kernels = " / ".join(f"{part['kernels']} ({part['products']})" for part in parts)
        rows.append(
            [workload, name.removesuffix(", highest"), precision(program)]
            + (cycles if TARGETS[target].platform == "tpu" else [])
            + [kernels, mebibytes(program), f"{program['compile_seconds']:.0f}"]
        )
    header = [target, "", "precision", "kernels (with products)", "temporary MiB", "s to compile"]
    if TARGETS[target].platform == "tpu":
        header.insert(3, "cycles: a step / its reverse / once")
    return report.markdown(header, rows)


def precision(program: dict[str, Any]) -> str:
    """Of the products in a step and its reverse."""
    parts = [program["forward"], program["backward"]]
    products, full = (sum(part[name] for part in parts) for name in ("products", "full"))
    if full in (0, products):
        return "full" if full else "default"
    return f"full in {full / products:.0%}"


def mebibytes(program: dict[str, Any]) -> str:
    return f"{program['temporary_bytes'] / 2**20:.1f}"


def ratios(results: dict) -> str:
    """Of cycles on a TPU, and of kernels on a GPU."""
    rows = []
    for case, (target, workload) in CASES.items():
        found = results["cases"].get(case, {}).get("programs", {})
        for peer in ("diffrax, highest", "jax odeint, highest"):
            if peer in found and "jaxode" in found:
                unit = "cycles" if TARGETS[target].platform == "tpu" else "kernels"
                ours, theirs = found["jaxode"], found[peer]
                quotients = [ours[x][unit] / theirs[x][unit] for x in ("forward", "backward")]
                quotients.append(ours["compile_seconds"] / theirs["compile_seconds"])
                peer = peer.removesuffix(", highest")
                rows.append([f"{target}, {unit}", workload, peer, *(f"{x:.2f}" for x in quotients)])
    header = ["jaxode over a peer at full precision", "", "", "a step", "its reverse", "compiling"]
    return report.markdown(header, rows)


def crossing(results: dict) -> str:
    rows = []
    for target, workload, name, program in programs(results, lambda each: each.chips > 1):
        found = program["collectives"]
        parts = [c for c in found if c["depth"] == 0], [c for c in found if c["depth"] > 0]
        shown = [f"{len(part)}, {sum(c['bytes'] for c in part):,} bytes" for part in parts]
        rows.append([target, workload, name, *shown, mebibytes(program)])
    header = [
        "collectives",
        "",
        "",
        "once a training step",
        "at each trip of a loop",
        "temporary MiB",
    ]
    return report.markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--fresh", action="store_true")
    fresh = parser.parse_args().fresh
    os.environ.update(ENVIRONMENT)
    (ROOT / "out").mkdir(exist_ok=True)
    log = ROOT / "out" / "accelerators.log"
    results = {} if fresh else runner.read(RESULTS)
    results = {
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "cases": results.get("cases", {}),
    }
    for case in CASES:
        if case not in results["cases"]:
            print(case, flush=True)
            result = runner.measure("accelerators", case, 0.0, log, lambda name: None)
            results["cases"][case] = result | {"code": runner.code()}
            runner.save(RESULTS, results)
            for peer, reason in {"": result.get("crashed"), **result.get("failed", {})}.items():
                if reason:
                    print(case, peer, reason, flush=True)
    print(*tables(results), sep="\n\n")
    PAGE.write_text(report.between(PAGE.read_text(), "accelerators", tables(results)))


if __name__ == "__main__":
    main()
