"""What the training step of a flow becomes on accelerators, and the gradient of stiff problems,
compiled without one.

    make bench-accelerators

`libtpu` and the CUDA plugin of JAX compile for the description of a device. Nothing runs, so there
are no times, but kernels and products of matrices, the cycles that XLA estimates for a TPU,
temporary memory, what crosses between chips, and the time to compile. Several chips have a whole
batch of the workload each. Writes benchmarks/results/accelerators.json and the tables of
docs/devices.md.

An interrupted run continues with the next case; `--fresh` compiles all again.
"""

import contextlib
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxode
from benchmarks.cases import stiff
from benchmarks.harness import hlo, machine, report, runner, show
from benchmarks.harness.benchmark import Benchmark, Result
from benchmarks.harness.fairness import Bench, attempt
from benchmarks.harness.problems import FlowProblem, Workload, network
from benchmarks.peers import flows

RESULTS = runner.RESULTS / "accelerators.json"
PAGE = machine.ROOT / "docs" / "devices.md"
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
    "512 x 2, 64-64-64": Workload(2, 512, (64, 64, 64)),
    "1000 x 43, 860-860": Workload(43, 1000, (860, 860)),
}
# A row of `tests/problems.py` for each: below and above `MOST_UNROLLED` unknowns.
STIFF = {"1000 of Robertson's": "robertson", "1000 of POLLU": "pollution"}
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
    forward: tuple[int, ...] = (6,)
    """As `backward`; evaluations in a step of Dormand and Prince, or of Tsitouras."""


# Steps taken again from a checkpoint (none if their stages are kept), and stages pulled back, less
# the one that is a node of the quadrature. Where kernels are what costs, the nodes have no loop: a
# batch, and that one.
JAXODE = {"512 x 2, 64-64-64": (0, 5), "1000 x 43, 860-860": (0, 3, 5)}
FIRST_STEP = (2,)  # slopes that choose its size
RODAS5P = 7  # stages in a loop, after those at the start of a step
DIFFRAX = (6, 6)  # stages evaluated again, and pulled back
ODEINT = (6,)  # stages of a step of the adjoint ODE, which has its own steps


def contenders(p: FlowProblem, mesh: Mesh, trips) -> dict[str, Contender]:
    at = lambda loss: flows.at(TOLERANCE, loss)
    ours, of_odeint = at(flows.jaxode_loss()), at(flows.odeint_loss)
    by_diffrax = Contender(jax.value_and_grad(at(flows.diffrax_loss())), p.probe, DIFFRAX)
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
    mapped = lambda loss: Contender(
        flows.shard_mapped(loss, mesh, everywhere, rows, everywhere), p.key, trips, FIRST_STEP
    )
    untyped = flows.shard_mapped_untyped(of_odeint, mesh, everywhere, rows, rows)
    return {
        "jaxode, shard_map": mapped(ours),
        "jaxode, shard_map, joint steps": mapped(at(flows.jaxode_loss(axis_name=flows.AXIS))),
        "diffrax, jit": by_diffrax,  # https://github.com/patrick-kidger/diffrax/issues/765
        "jax odeint, shard_map": Contender(untyped, p.probe, ODEINT),
    }


def stiff_problem(name: str, mesh: Mesh) -> tuple[FlowProblem, dict[str, Contender]]:
    """Rows with their own rates and steps, and the gradient by the rates."""
    problem, solver = stiff.problems()[name], jaxode.Rodas5P()
    ends = lambda rates, y0: stiff.rows_by_jaxode(
        problem.f, y0, problem.t1, rates, 1e-4, 1e-8, solver
    )
    step = jax.value_and_grad(lambda rates, y0, noise: jnp.sum(ends(rates, y0)))
    rows = lambda numbers: jax.ShapeDtypeStruct(
        (stiff.ROWS, len(numbers)), jnp.float32, sharding=NamedSharding(mesh, P())
    )
    by_jaxode = Contender(step, None, (0, RODAS5P), FIRST_STEP, forward=(RODAS5P,))
    return FlowProblem(rows(problem.args), rows(problem.y0), None, None), {"jaxode": by_jaxode}


def mesh_of(target: Target) -> Mesh:
    options: dict[str, Any] = {}
    if target.platform == "cuda":
        options = {"target_config": H100, "topology": target.topology}
    described = topologies.get_topology_desc(target.topology, target.platform, **options)
    return Mesh(np.array(described.devices[: target.chips]), (flows.AXIS,))


def shapes(workload: Workload, mesh: Mesh) -> FlowProblem:
    """Shapes in place of arrays, with a whole batch for each chip."""
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(flows.AXIS))
    placed = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)
    make = lambda: (network(workload), jax.random.key(0))
    params, key = jax.tree.map(placed, jax.eval_shape(make))
    rows = mesh.size * workload.batch
    x = jax.ShapeDtypeStruct((rows, workload.dim), jnp.float32, sharding=split)
    return FlowProblem(params, x, x, key)


def compiled(contender: Contender, p: FlowProblem, platform: str) -> dict[str, Any]:
    precision, started = contender.precision, time.perf_counter()
    # A process on such a machine has it as its backend, by which jaxode chooses how to go back.
    backend = "gpu" if platform == "cuda" else platform
    at = jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()
    with mock.patch.object(jax, "default_backend", return_value=backend), at:
        traced = jax.jit(contender.step).trace(p.params, p.x, contender.noise)
    program: Any = traced.lower(lowering_platforms=(platform,)).compile()
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
        "forward": ahead.trip(*contender.forward)._asdict(),
        "backward": back.trip(*contender.backward)._asdict(),
        "once": once.trip(*contender.once)._asdict(),
        "collectives": program.collectives,
    }


class Accelerators(Benchmark):
    cases = {
        f"{target}, {workload}": (target, workload)
        for target, chosen in TARGETS.items()
        for workload in (*WORKLOADS, *(STIFF if chosen.chips == 1 else ()))
    }
    seconds = 0.0

    def run(self, case: str, bench: Bench) -> Result:
        # What is compiled for is only described: this process runs on the CPU.
        jax.config.update("jax_platforms", "cpu")
        target, workload = self.cases[case]
        mesh = mesh_of(TARGETS[target])
        if workload in STIFF:
            p, compared = stiff_problem(STIFF[workload], mesh)
        else:
            p = shapes(WORKLOADS[workload], mesh)
            compared = contenders(p, mesh, JAXODE[workload])
        failed: dict[str, str] = {}
        found = {}
        for name, contender in compared.items():
            call = lambda contender=contender: compiled(contender, p, TARGETS[target].platform)
            program = attempt(bench, failed, name, call)
            if program is not None:
                found[name] = program
        return {"failed": failed, "programs": found}


BENCHMARK = Accelerators()


def tables(results: dict) -> list[str]:
    """Work on one device, and its ratios to the work of peers; then what crosses between chips."""
    alone = [target for target in TARGETS if TARGETS[target].chips == 1]
    return [*(table(results, target) for target in alone), ratios(results), crossing(results)]


def programs(results: dict) -> Iterator[tuple[str, str, dict[str, dict[str, Any]]]]:
    """`(target, workload, programs by contender)`, where something compiled."""
    for case, (target, workload) in BENCHMARK.cases.items():
        yield target, workload, results["cases"].get(case, {}).get("programs", {})


def table(results: dict, chosen: str) -> str:
    on_tpu, rows = TARGETS[chosen].platform == "tpu", []
    for target, workload, found in programs(results):
        for name, program in found.items() if target == chosen else ():
            parts = [program[part] for part in ("forward", "backward", "once")]
            cycles = " / ".join(f"{part['cycles'] / 1e3:,.0f}k" for part in parts)
            kernels = " / ".join(f"{part['kernels']} ({part['products']})" for part in parts)
            row = [workload, name.removesuffix(", highest"), precision(program)]
            row += [cycles, kernels] if on_tpu else [kernels]
            rows.append([*row, mebibytes(program), f"{program['compile_seconds']:.0f}"])
    header = [chosen, "", "precision", "kernels (with products)", "temporary MiB", "s to compile"]
    if on_tpu:
        header.insert(3, "cycles: a step / its reverse / once")
    return show.markdown(header, rows)


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
    for target, workload, found in programs(results):
        unit = "cycles" if TARGETS[target].platform == "tpu" else "kernels"
        for peer in ("diffrax", "jax odeint"):
            if f"{peer}, highest" in found and "jaxode" in found:
                ours, theirs = found["jaxode"], found[f"{peer}, highest"]
                quotients = [ours[x][unit] / theirs[x][unit] for x in ("forward", "backward")]
                quotients.append(ours["compile_seconds"] / theirs["compile_seconds"])
                rows.append([f"{target}, {unit}", workload, peer, *(f"{x:.2f}" for x in quotients)])
    header = ["jaxode over a peer at full precision", "", "", "a step", "its reverse", "compiling"]
    return show.markdown(header, rows)


def crossing(results: dict) -> str:
    rows = []
    for target, workload, found in programs(results):
        for name, program in found.items() if TARGETS[target].chips > 1 else ():
            crossed = program["collectives"]
            parts = [[c for c in crossed if (c["depth"] > 0) == inside] for inside in (False, True)]
            shown = [f"{len(part)}, {sum(c['bytes'] for c in part):,} bytes" for part in parts]
            rows.append([target, workload, name, *shown, mebibytes(program)])
    where = ["once a training step", "at each trip of a loop"]
    return show.markdown(["collectives", "", "", *where, "temporary MiB"], rows)


def measured(given: Namespace) -> int:
    os.environ.update(ENVIRONMENT)
    cases = runner.read(RESULTS).get("cases", {})
    results = {"machine": {"device": machine.cpu(), "cores": 1}}
    results["benchmarks"] = {"accelerators": cases}
    alone = lambda results: {
        "versions": machine.versions(PACKAGES),
        "cases": results["benchmarks"].get("accelerators", {}),
    }
    keep = lambda results: runner.save(RESULTS, alone(results))
    runner.run(["accelerators"], results, keep, given.fresh)
    shown = tables(alone(results))
    print(*shown, sep="\n\n")
    PAGE.write_text(report.between(PAGE.read_text(), "accelerators", shown))
    return 0


if __name__ == "__main__":
    sys.exit(runner.finish(measured, runner.parser_of(__doc__).parse_args()))
