"""One case of one benchmark in a separate process, which may die without harm to the others.

    python -m benchmarks.harness.worker ffjord_step CASE REPORT OPTIONS

Appends JSON lines to the file REPORT: `{"next": name}` before each contender, and at the end
`{"result": ...}`. With `machine` and a file as its only arguments it describes the machine.
"""

import json
import sys
from pathlib import Path

import jax

from benchmarks.cases import load
from benchmarks.harness.fairness import Bench
from benchmarks.harness.machine import machine


def main(name: str, case: str, report: str, options: str) -> None:
    # Out of memory? Then let the kernel end this process, and no other.
    oom = Path("/proc/self/oom_score_adj")
    if oom.exists():
        oom.write_text("1000")
    jax.config.update("jax_enable_compilation_cache", False)

    def say(**message):
        with open(report, "a") as file:
            file.write(json.dumps(message) + "\n")

    bench = Bench(announce=lambda name: say(next=name), **json.loads(options))
    say(result=load(name).run(case, bench))


if __name__ == "__main__":
    if sys.argv[1:2] == ["machine"]:
        Path(sys.argv[2]).write_text(json.dumps(machine()))
    else:
        main(*sys.argv[1:])
