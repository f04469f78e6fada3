"""What crosses between devices in a training step of a flow with a sharded batch.

Read from the compiled HLO on virtual CPU devices; nothing is timed. A collective inside a loop is
paid at every iteration: of the loop over steps at depth 1, of the loop over stages at depth 2.
Under `shard_map` each device takes its own steps, or with joint steps the same.
"""

from collections.abc import Iterator
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks.cases.cores import mesh_of
from benchmarks.harness import hlo, show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench, attempt
from benchmarks.harness.problems import Workload, untrained
from benchmarks.peers import flows

TOLERANCE = 1e-5
CONTENDERS = (
    "jaxode, shard_map", "jaxode, shard_map, joint steps", "diffrax, shard_map", "jaxode, jit",
    "diffrax, jit",
)  # fmt: skip
STEPS, STAGES = 10, 6  # of a backward solve, for the figures on paper


def in_loops(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [c for c in found if c["depth"] > 0]


def trips(collective: dict[str, Any]) -> int:
    """How often it runs in a training step."""
    return {0: 1, 1: STEPS}.get(collective["depth"], STEPS * STAGES)


def sent(found: list[dict[str, Any]], devices: int) -> float:
    """MiB that each device sends in a training step, all collectives as rings."""
    return sum(2 * (devices - 1) / devices * c["bytes"] * trips(c) for c in found) / 2**20


class Sharding(Benchmark):
    title = "What crosses between devices"
    timed = False
    cases = {"1 device": 1, "2 devices": 2, "4 devices": 4, "8 devices": 8}
    workload = Workload(8, 512, (256, 256))

    def run(self, case: str, bench: Bench) -> Result:
        mesh = mesh_of(self.cases[case])
        p, steps = flows.over_devices(untrained(self.workload), mesh), flows.on_devices(mesh)
        failed: dict[str, str] = {}
        found = {}
        for name in CONTENDERS:
            args = p.params, p.x, flows.noise_of(p, name), TOLERANCE
            text = attempt(
                bench,
                failed,
                name,
                lambda name=name, a=args: steps[name].lower(*a).compile().as_text(),
            )
            if text is not None:
                found[name] = [c for c in hlo.collectives(text) if self.cases[case] > 1]
        parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(p.params))
        return {"failed": failed, "collectives": found, "parameter_bytes": parameters}

    def table(self, results: Results) -> str:
        rows = []
        for case, result in results.items():
            for name, found in result["collectives"].items():
                outside = [c for c in found if c["depth"] == 0]
                told = [
                    f"{len(part)}, {sum(c['bytes'] for c in part):,} bytes"
                    for part in (outside, in_loops(found))
                ]
                rows.append([case, name, *told])
        header = ["", "", "once a training step", "at every iteration of a loop"]
        failed = "".join(dict.fromkeys(show.failures(result) for result in results.values()))
        return f"{show.markdown(header, rows)}\n\n{self.on_paper(results)}{failed}"

    def on_paper(self, results: Results) -> str:
        last = list(results.values())[-1]
        parts = [
            f"{name}: {sent(found, 8):.1f} MiB on 8 and {sent(found, 256):.1f} MiB on 256, in "
            f"{sum(map(trips, found))} collectives"
            for name, found in last["collectives"].items()
        ]
        return (
            f"On paper, a device sends in a training step with {STEPS} steps of {STAGES} stages, "
            f"by ring all-reduce ({last['parameter_bytes'] / 2**20:.1f} MiB of parameters): "
            f"{'; '.join(parts)}."
        )

    def draw(self, results: Results) -> Figure:
        last, result = list(results.items())[-1]
        groups = {
            f"sent by a device in a training step on {n} devices": {
                name: sent(found, n) for name, found in result["collectives"].items()
            }
            for n in (8, 256)
        }
        figure = show.bars(groups, "MiB")
        figure.suptitle(f"{self.title} (program for {last})")
        return figure

    def sentence(self, results: Results) -> str:
        last, result = list(results.items())[-1]
        return f"On {last}, " + super().sentence({last: result})

    def told(self, results: Results) -> Iterator[str]:
        (result,) = results.values()
        for name, found in result["collectives"].items():
            size = sum(c["bytes"] for c in in_loops(found))
            count = len(in_loops(found))
            yield f"{name} has {count} collectives of {size:,} bytes inside loops"


BENCHMARK = Sharding()
