"""RESULTS.md, the README's tables, and all tables of a benchmark, from the results files."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import BENCHMARKS, ON_ITS_OWN, load, tables
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Results

PUBLISHED = "amd-epyc-2-cores"
"""The machine of the README's tables and of the pictures; where it has none, of another."""

LIBRARIES = ("diffrax", "jax odeint", "torchdiffeq", "zuko")
"""The columns of the README's table, and the groups of peers with their fastest variant."""

of_both = lambda case: (f"{case}, a network of the user", f"{case}, jaxode.nn")
ROWS = {
    "training step, flow, 512 x 2": ("ffjord_step", of_both("8 Gaussians, 512 x 2, 64-64-64")),
    "training step, Neural ODE, 256 x 64, 20 times": (
        "neural_ode_step", of_both("64-64, state 64, batch 256, 20 times")
    ),
    "log-density of 10,000 conditional rows": (
        "evaluate", ("10,000 x 5 given 8, a network of the user", "10,000 x 5 given 8, jaxode.nn")
    ),
    "1,000 stiff systems (Robertson), solve / gradient": (
        "stiff", ("1,000 of Robertson's, solve", "1,000 of Robertson's, gradient")
    ),
    "first call, flow / Neural ODE": (
        "compile_time", ("flow, 8 Gaussians, a user's own field", "Neural ODE, state 4")
    ),
}  # fmt: skip
"""The rows of the README's table: a benchmark, and one or two of its cases."""

TABLES = ("abalone", "breast cancer", "magic", "texture", "white wine")
"""The tables whose densities the README shows; on two of them another library is best."""


def write(folder: Path, root: Path) -> None:
    """RESULTS.md and pictures from the results files of all machines, the README's from one."""
    machines = read(folder)
    images = root / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    (root / "benchmarks" / "RESULTS.md").write_text("\n\n".join(page(machines)) + "\n")
    for results in machines:
        if results["machine"]["name"] == PUBLISHED:
            draw(results, images)
            readme = root / "README.md"
            for name, parts_of in (("benchmarks", ratios), ("densities", densities)):
                text = between(readme.read_text(), name, parts_of(results), "\n")
                readme.write_text(text)


def read(folder: Path) -> list[dict[str, Any]]:
    """The results of each machine, those of the published one first."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    machines = [results for results in found if "benchmarks" in results]
    return sorted(machines, key=lambda results: results["machine"]["name"] != PUBLISHED)


def page(machines: list[dict[str, Any]]) -> list[str]:
    """RESULTS.md: what is `brief` of each benchmark, of the first machine that has it."""
    first = machines[0]["machine"]["device"]
    shown: dict[str, list[str]] = {}
    elsewhere: dict[str, list[str]] = {}
    measured: list[str] = []
    for results in machines:
        device = results["machine"]["device"]
        for name, benchmark, done, _ in finished(results):
            told = benchmark.brief(done)
            if told and name not in shown:
                shown[name] = [f"## {benchmark.title}", told]
                measured.append(f"{benchmark.title} {', '.join(commits(done))}")
                if device != first:
                    elsewhere.setdefault(device, []).append(benchmark.title)
    others = "".join(f"; on {device}: {', '.join(told)}" for device, told in elsewhere.items())
    return [
        "# Results",
        f"On {first}{others}. `python -m benchmarks --show NAME` prints all that "
        "was measured, on every machine: each contender's times and errors, ranges, commits, and "
        "what failed. [README.md](README.md) has the names, and says how it is measured. "
        "Ratios are of jaxode's time, or memory, to that of the fastest variant of each library, "
        "at equal error: below 1 jaxode is faster, above it, in bold, the other. Of two, the first "
        "is with a network as users write it, the second with one of `jaxode.nn`.",
        *(part for parts in shown.values() for part in parts),
        f"Commits: {'; '.join(measured)}.",
    ]


def finished(results: dict[str, Any]) -> Iterator[tuple[str, Benchmark, Results, Results]]:
    """`(name, benchmark, cases that are done, cases that crashed)` of each, in order."""
    for name in (*BENCHMARKS, *ON_ITS_OWN):
        cases = results["benchmarks"].get(name)
        if cases:
            benchmark = load(name)
            known = {case: cases[case] for case in benchmark.cases if case in cases}
            done = {case: result for case, result in known.items() if "crashed" not in result}
            if known:
                yield name, benchmark, done, {c: r for c, r in known.items() if c not in done}


def draw(results: dict[str, Any], images: Path) -> None:
    for name, benchmark, done, _ in finished(results):
        figure = benchmark.draw(done) if done else None
        if figure is not None:
            show.save(figure, benchmark.title, images / f"bench_{name}.png")


def sections(results: dict[str, Any], names: Collection[str] = ()) -> list[str]:
    """All that was measured on a machine, of these benchmarks or of all."""
    machine = results["machine"]
    # That of jaxode is in the commit of each section.
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if k != "jaxode")
    threads = ", ".join(f"{n} of {name}" for name, n in machine["threads"].items() if n)
    hardware = f"{machine['device']}, {machine['memory_gib']} GiB of memory, threads: {threads}."
    parts = []
    for name, benchmark, done, crashed in finished(results):
        if names and name not in names:
            continue
        parts.append(f"### {benchmark.title}")
        if done:
            parts += [
                *show.ratios(done),
                benchmark.table(done),
                f"Commit {', '.join(commits(done))}.",
            ]
        parts += [f"{case} crashed: {result['crashed']}" for case, result in crashed.items()]
    heading = [f"## {machine['name']}", f"{hardware} Versions: {versions}."]
    return [*heading, *parts] if parts else []


def commits(cases: Results) -> list[str]:
    return list(dict.fromkeys(str(case.get("code")) for case in cases.values()))


def ratios(results: dict[str, Any]) -> list[str]:
    """The table of the README: our time over the time of each library's fastest variant."""
    rows, measured = [], []
    benchmarks = {name: done for name, _, done, _ in finished(results)}
    for label, (name, cases) in ROWS.items():
        done = [benchmarks[name][case] for case in cases if case in benchmarks.get(name, {})]
        if done:
            cells = [[of(result, library) for result in done] for library in LIBRARIES]
            rows.append([label, *(" / ".join(x) if set(x) != {"-"} else "" for x in cells)])
            measured += done
    codes = sorted({str(result.get("code")) for result in measured})
    return [show.markdown([measured_at(results, codes), *LIBRARIES], rows)]


def of(result: dict[str, Any], library: str) -> str:
    """The ratio to the fastest variant of a library."""
    ratio = result["ratios"].get(library, result["ratios"].get(f"best of {library}"))
    return "-" if ratio is None else f"{ratio:.2f}"


def densities(results: dict[str, Any]) -> list[str]:
    """The table of the README on densities of tables, after a minute."""
    for name, _, every, _ in finished(results):
        done = {case: every[case] for case in every if case.startswith(TABLES)}
        if name == "tables" and done:
            table = tables.BENCHMARK.after(done, "60").replace(", 3 seeds", "")
            return [table.replace("nats after 60 s", measured_at(results, []) + " Nats", 1)]
    return []


def measured_at(results: dict[str, Any], codes: list[str]) -> str:
    told = f"; commit {', '.join(codes)}" if codes else ""
    return f"{results['machine']['device']}{told}."


def between(text: str, name: str, parts: list[str], gap: str = "\n\n") -> str:
    """The text with these parts between the comments of that name."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = text.split(start)
    after = rest.split(end)[1]
    return before + gap.join([start, *parts]) + f"\n{end}" + after
