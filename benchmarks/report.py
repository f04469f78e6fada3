"""Markdown tables, pictures and sentences from a results file."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from benchmarks import BENCHMARKS, ON_ITS_OWN

# One color and marker for a library, everywhere; its variants differ in the line.
COLORS = {
    "jaxode": "#c2185b", "diffrax": "#1565c0", "jax": "#2e7d32", "torchdiffeq": "#ef6c00",
    "zuko": "#6a1b9a", "torchode": "#5d4037", "torchcfm": "#00838f", "flowjax": "#9e9d24",
    "sbi": "#1565c0",
}  # fmt: skip
LIBRARIES = ("diffrax", "jax odeint", "torchdiffeq", "zuko")
"""The columns of the README's table, and the groups of peers with their fastest variant."""
IN_README = ("ffjord_step", "neural_ode_step", "compile_time")
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


def styles(names) -> dict[str, dict[str, Any]]:
    seen: dict[str, int] = {}
    result = {}
    for name in names:
        library = re.match(r"[a-z]+", name)
        key = library.group() if library else name
        line = LINES[seen.get(key, 0) % len(LINES)]
        seen[key] = seen.get(key, 0) + 1
        width = 2.2 if key == "jaxode" else 1.3
        result[name] = {"color": COLORS.get(key, "#555555"), "linestyle": line, "linewidth": width}
    return result


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def ratio_line(case: dict[str, Any]) -> str:
    best = case.get("best", {})
    parts = [
        f"{name}{f' ({best[name]})' if best.get(name, name) != name else ''}: **{value:.2f}**"
        for name, value in case.get("ratios", {}).items()
    ]
    return f"Time of jaxode divided by the time of {'; '.join(parts)}." if parts else ""


def failures(case: dict[str, Any]) -> str:
    return "".join(f"\n\n{name} failed: {why}" for name, why in case.get("failed", {}).items())


def work_precision_tables(cases: dict[str, Any]) -> str:
    parts = []
    for case, result in cases.items():
        target, rows = result["target_error"], []
        for name, curve in result["curves"].items():
            at = result["at_target"][name]
            shown = "not reached"
            if "median" in at:
                spread = f"{ms(at['median'])} ({ms(at['min'])}-{ms(at['max'])})"
                shown = f"at most {spread}" if at["note"] else spread
            points = ", ".join(f"{ms(row['median'])} / {row['error']:.0e}" for row in curve)
            rows.append([name, shown, str(curve[-1]["rounds"]), points])
        header = [
            "", f"ms at gradient error {target:.0e}, median (min-max)", "rounds",
            "ms / gradient error at each tolerance, the last two in every round",
        ]  # fmt: skip
        parts.append(
            f"**{case}**\n\n{markdown(header, rows)}\n\n{ratio_line(result)}{failures(result)}"
        )
    return "\n\n".join(parts)


def draw_work_precision(cases: dict[str, Any], path: str, title: str) -> None:
    columns = min(len(cases), 2)
    rows = -(-len(cases) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(7.0, 4.6 * columns), 0.8 + 3.3 * rows),
        squeeze=False,
        layout="constrained",
    )
    style = styles(dict.fromkeys(n for result in cases.values() for n in result["curves"]))
    handles = {}
    for axis, (case, result) in zip(axes.flat, cases.items(), strict=False):
        for name, curve in result["curves"].items():
            xs, ys = [row["error"] for row in curve], [1e3 * row["median"] for row in curve]
            (handles[name],) = axis.loglog(xs, ys, marker="o", markersize=3.5, **style[name])
            low, high = ([1e3 * row[end] for row in curve] for end in ("min", "max"))
            axis.vlines(xs, low, high, color=style[name]["color"], linewidth=0.8, alpha=0.6)
        axis.axvline(result["target_error"], color="#999999", linewidth=0.8, zorder=0)
        axis.set(title=case, xlabel="relative error of the gradient", ylabel="ms per step")
        axis.invert_xaxis()
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    finish(figure, axes, title, path, handles)


def finish(figure, axes, title: str, path: str, handles: dict[str, Any]) -> None:
    for axis in axes.flat:
        axis.grid(which="major", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        for scale in (axis.xaxis, axis.yaxis):
            low, high = sorted(scale.get_view_interval())
            # A decade or two are common: label 1, 2, 5.
            if scale.get_scale() == "log" and high < 300 * low:
                scale.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                scale.set_major_formatter(ticker.FormatStrFormatter("%g"))
                scale.set_minor_formatter(ticker.NullFormatter())
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(9)
        axis.tick_params(which="both", labelsize=8)
        axis.xaxis.label.set_fontsize(8)
        axis.yaxis.label.set_fontsize(8)
    figure.suptitle(title, fontsize=11)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8,
        frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(
    panels: dict[str, dict[str, list[tuple[float, float]]]], path: str, title: str, unit: str,
    log_y: bool = True, marker: str | None = "o",
) -> None:  # fmt: skip
    """Points `(x, y)` by contender, the axes logarithmic; one panel for each quantity `x`."""
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(
        rows, 2, figsize=(9.2, 0.8 + 2.7 * rows), squeeze=False, layout="constrained"
    )
    style = styles(dict.fromkeys(name for curves in panels.values() for name in curves))
    handles = {}
    for axis, (label, curves) in zip(axes.flat, panels.items(), strict=False):
        for name, points in curves.items():
            xs, ys = zip(*points, strict=True)
            (handles[name],) = axis.loglog(xs, ys, marker=marker, markersize=3.5, **style[name])
        axis.set(xlabel=label, ylabel=unit, yscale="log" if log_y else "linear")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    finish(figure, axes, title, path, handles)


def draw_bars(groups: dict[str, dict[str, float]], path: str, title: str, unit: str) -> None:
    """Horizontal bars with their values, one panel for each group."""
    sizes = [max(len(bars), 2) for bars in groups.values()]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(7.0, 0.6 + 0.75 * len(groups) + 0.26 * sum(sizes)), squeeze=False,
        layout="constrained", height_ratios=sizes,
    )  # fmt: skip
    for axis, (group, bars) in zip(axes.flat, groups.items(), strict=True):
        style = styles(bars)
        colors = [style[name]["color"] for name in bars]
        drawn = axis.barh(list(bars), list(bars.values()), color=colors, height=0.7)
        axis.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set(title=group, xlabel=unit)
    finish(figure, axes, title, path, {})


def work_precision_sentence(cases: dict[str, Any]) -> str:
    """Against the fastest peer that is as accurate."""
    parts = []
    for case, result in cases.items():
        at = {n: a for n, a in result["at_target"].items() if "median" in a}
        peers = {n: a for n, a in at.items() if not n.startswith("jaxode")}
        if "jaxode" not in at:
            parts.append(f"{case}: jaxode does not reach the error")
        elif not peers:
            parts.append(f"{case}: no peer reaches the error")
        else:
            ratio, best = result["ratios"]["all peers"], result["best"]["all peers"]
            parts.append(f"{case}: {verdict(ratio, best)}")
    return "; ".join(parts) + "."


def against(ours: float, theirs: float, peer: str) -> str:
    return verdict(ours / theirs, peer)


def verdict(ratio: float, peer: str) -> str:
    return f"jaxode takes {ratio:.2f}x as long as {peer}"


def write(folder: Path, root: Path) -> None:
    """RESULTS.md and the pictures from the results files of all machines; the README's table."""
    parts = [
        "# Results",
        "Generated by `make bench`. [README.md](README.md) says what is measured, and how.",
    ]
    images = root / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.glob("*.json")):
        results = json.loads(file.read_text())
        if "benchmarks" in results:
            draw(results, images)
            parts += sections(results)
            if results["machine"]["kind"] == "cpu":
                readme = between((root / "README.md").read_text(), "benchmarks", ratios(results))
                readme = between(readme, "densities", densities(results))
                (root / "README.md").write_text(readme)
    (root / "benchmarks" / "RESULTS.md").write_text("\n\n".join(parts) + "\n")


def finished(results: dict[str, Any]):
    """`(name, module, cases that are done, cases that crashed)` of each benchmark, in order."""
    for name in (*BENCHMARKS, *ON_ITS_OWN):
        cases = results["benchmarks"].get(name)
        if cases:
            module = importlib.import_module(f"benchmarks.{name}")
            known = {case: cases[case] for case in module.CASES if case in cases}
            done = {case: result for case, result in known.items() if "crashed" not in result}
            yield name, module, done, {c: r for c, r in known.items() if c not in done}


def picture_of(results: dict[str, Any], name: str) -> str:
    """Those of an accelerator stand beside those of the CPU."""
    machine = results["machine"]
    return f"bench_{name}{'' if machine['kind'] == 'cpu' else '_' + machine['name']}.png"


def draw(results: dict[str, Any], images: Path) -> None:
    for name, module, done, _ in finished(results):
        if done:
            module.draw(done, str(images / picture_of(results, name)))


def sections(results: dict[str, Any]) -> list[str]:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = ", ".join(f"{n} of {name}" for name, n in machine["threads"].items() if n)
    hardware = f"{machine['device']}, {machine['memory_gib']} GiB of memory, threads: {threads}."
    parts = [f"## {machine['name']}", f"{hardware} Versions: {versions}."]
    for name, module, done, crashed in finished(results):
        parts.append(f"### {module.TITLE}")
        if done:
            shown = f"![{module.TITLE}](../docs/images/{picture_of(results, name)})"
            commits = ", ".join(dict.fromkeys(str(case.get("code")) for case in done.values()))
            parts += [module.sentence(done), shown, module.table(done), f"Commit {commits}."]
            parts += elsewhere(results, done)
        parts += [f"{case} crashed: {result['crashed']}" for case, result in crashed.items()]
    return parts


def elsewhere(results: dict[str, Any], cases: dict[str, Any]) -> list[str]:
    """The cases that were measured on another machine than the rest."""
    here = results["machine"]["device"]
    apart: dict[str, list[str]] = {}
    for case, result in cases.items():
        if result.get("device", here) != here:
            apart.setdefault(result["device"], []).append(case)
    return [f"Measured on {device}: {'; '.join(names)}." for device, names in apart.items()]


def ratios(results: dict[str, Any]) -> list[str]:
    """The table of the README: our time over the time of each library's fastest variant.

    A size has one row: with a network of the user, and with one of `jaxode.nn`.
    """
    rows: dict[str, list[list[str]]] = {}
    commits = set()
    for name, module, done, _ in finished(results):
        if name in IN_README:
            for case, result in done.items():
                commits.add(result["code"])
                size = case.removesuffix(", a network of the user").removesuffix(", jaxode.nn")
                cells = [result["ratios"].get(library) for library in LIBRARIES]
                shown = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
                rows.setdefault(f"{module.SHORT}: {size}", []).append(shown)
    joined = [
        [
            label,
            *(" / ".join(cell) if set(cell) != {"-"} else "" for cell in zip(*both, strict=True)),
        ]
        for label, both in rows.items()
    ]
    device = results["machine"]["device"]
    return [
        markdown(["", *LIBRARIES], joined),
        f"{device}; commit {', '.join(sorted(commits))}.",
    ]


def densities(results: dict[str, Any]) -> list[str]:
    """The table of the README on densities of tables, after a minute."""
    for name, module, done, _ in finished(results):
        if name == "tables" and done:
            commits = dict.fromkeys(str(case["code"]) for case in done.values())
            code = f"{results['machine']['device']}; commit {', '.join(commits)}."
            return [module.after(done, "60"), module.seeds_and_delay(done), code]
    return []


def between(text: str, name: str, parts: list[str]) -> str:
    """The text with these parts between the comments of that name."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = text.split(start)
    after = rest.split(end)[1]
    return before + "\n\n".join([start, *parts, end]) + after
