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
    "zuko": "#6a1b9a", "torchode": "#5d4037", "torchcfm": "#00838f",
    "sbi": "#1565c0",
}  # fmt: skip
AT_A_GLANCE = ("ffjord_step", "neural_ode_step", "time_to_nll")  # open in the README
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
    return "Time of jaxode over that of " + "; ".join(parts) + "." if parts else ""


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
            rows.append([name, shown, points])
        header = [
            "", f"ms at gradient error {target:.0e}, median (min-max)",
            "ms / gradient error at each tolerance",
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
        axis.set(title=case, xlabel="relative error of the gradient", ylabel="ms a step")
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
    """Where jaxode wins and where it loses, against the fastest peer that is as accurate."""
    parts = []
    for case, result in cases.items():
        at = {n: a for n, a in result["at_target"].items() if "median" in a}
        peers = {n: a for n, a in at.items() if not n.startswith("jaxode")}
        mine = at.get("jaxode")
        if mine is None:
            parts.append(f"jaxode does not reach the error ({case})")
        elif not peers:
            parts.append(f"no peer reaches the error ({case})")
        else:
            ratio, best = result["ratios"]["all peers"], result["best"]["all peers"]
            parts.append(f"{verdict(ratio, best)} ({case})")
    return "; ".join(parts) + "."


def against(ours: float, theirs: float, peer: str) -> str:
    return verdict(ours / theirs, peer)


def verdict(ratio: float, peer: str) -> str:
    """ "jaxode wins with 0.61 of the time of ...", or loses; within 5% it is a draw."""
    word = "wins" if ratio < 0.95 else "loses" if ratio > 1.05 else "draws"
    return f"jaxode {word} with {ratio:.2f} of the time of {peer}"


def write(folder: Path, root: Path) -> None:
    """RESULTS.md, the pictures and the README's list, from the results files of all machines."""
    parts = [
        "# Results",
        "Generated by `make bench`. [README.md](README.md) says what is measured, and how.",
    ]
    images, listed = root / "docs" / "images", []
    images.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.glob("*.json")):
        results = json.loads(file.read_text())
        if "benchmarks" in results:
            draw(results, images)
            parts += sections(results)
            listed += gallery(results)
    (root / "benchmarks" / "RESULTS.md").write_text("\n\n".join(parts) + "\n")
    readme = root / "README.md"
    readme.write_text(with_gallery(readme.read_text(), listed))


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
            parts += [module.sentence(done), shown, module.table(done)]
        parts += [f"{case} crashed: {result['crashed']}" for case, result in crashed.items()]
    return parts


def gallery(results: dict[str, Any]) -> list[str]:
    """For each benchmark what it shows, in a sentence and a picture, losses included."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    for name, module, done, _ in finished(results):
        if done:
            told = parts[name in AT_A_GLANCE]
            told.append(f"**{module.TITLE}.** {module.sentence(done)}")
            if all("at_target" in result for result in done.values()):
                told.append(times_at_error(done))
            told += dict.fromkeys(failures(r).strip() for r in done.values() if r.get("failed"))
            told.append(f"![{module.TITLE}](docs/images/{picture_of(results, name)})")
    device = results["machine"]["device"]
    more = f"<details><summary>All other benchmarks on {device}</summary>"
    return [f"On {device}:", *parts[True], more, *parts[False], "</details>"]


def times_at_error(cases: dict[str, Any]) -> str:
    """Milliseconds of each contender at the error at which times are compared."""
    names = dict.fromkeys(name for result in cases.values() for name in result["at_target"])

    def shown(place: dict[str, Any] | None) -> str:
        if place is None:
            return ""
        return ms(place["median"]) if "median" in place else "not as accurate"

    rows = [[n, *(shown(result["at_target"].get(n)) for result in cases.values())] for n in names]
    return markdown(["ms", *cases], rows)


def with_gallery(readme: str, parts: list[str]) -> str:
    """The text with the list in its place, between two comments."""
    return between(readme, "benchmarks", parts)


def between(text: str, name: str, parts: list[str]) -> str:
    """The text with these parts between the comments of that name."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = text.split(start)
    after = rest.split(end)[1]
    return before + "\n\n".join([start, *parts, end]) + after
