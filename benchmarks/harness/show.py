"""Tables and pictures: how results look, whatever they are of."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# One color for a library, everywhere; its variants differ in the line.
COLORS = {
    "jaxode": "#c2185b", "diffrax": "#1565c0", "jax": "#2e7d32", "torchdiffeq": "#ef6c00",
    "zuko": "#6a1b9a", "torchode": "#5d4037", "torchcfm": "#00838f", "flowjax": "#9e9d24",
    "sbi": "#1565c0", "jflows": "#1565c0", "bijx": "#2e7d32",
}  # fmt: skip
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))

Points = Sequence[tuple[float, float]]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def ratios(results: Mapping[str, Any]) -> list[str]:
    """A table of the ratios to groups of peers, each with its fastest member, if there are any."""

    def cell(result: Mapping[str, Any], group: str) -> str:
        ratio, best = result["ratios"].get(group), result.get("best", {}).get(group, group)
        shown = "" if ratio is None else f"{ratio:.2f}"
        return shown if ratio is None or best == group else f"{shown} ({best})"

    groups = groups_of(results)
    rows = [
        [name, *(cell(case, group) for group in groups)]
        for name, case in results.items()
        if case.get("ratios")
    ]
    return [markdown(["jaxode divided by", *groups], rows)] if groups else []


def brief_ratios(results: Mapping[str, Any]) -> str:
    """A table of the ratios, in bold where peers are faster, both networks of a case in one row."""
    groups = groups_of(results)
    rows: dict[str, list[list[str]]] = {}
    for name, case in results.items():
        found = case.get("ratios", {})
        told = {group: f"{ratio:.2f}" for group, ratio in found.items()}
        told |= {group: f"**{told[group]}**" for group, ratio in found.items() if ratio > 1}
        if told:
            label = re.sub(", (a network of the user|jaxode.nn)$", "", name)
            rows.setdefault(label, []).append([told.get(group, "") for group in groups])
    cells = {label: [" / ".join(filter(None, of)) for of in zip(*found, strict=True)]
             for label, found in rows.items()}  # fmt: skip
    table = [[label, *row] for label, row in cells.items()]
    return markdown(["jaxode divided by", *groups], table) if groups else ""


def groups_of(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for case in results.values() for name in case.get("ratios", {})))


def least_in_bold(told: Mapping[str, str]) -> dict[str, str]:
    """The same texts, the least of those that are numbers in bold."""
    numbers = {name: float(text) for name, text in told.items() if re.fullmatch(r"-?[\d.]+", text)}
    least = min(numbers.values(), default=None)
    bold = {name for name, number in numbers.items() if number == least}
    return {name: f"**{text}**" if name in bold else text for name, text in told.items()}


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def spread(times: Mapping[str, float]) -> str:
    """The median of a summary in milliseconds, and its range."""
    return f"{ms(times['median'])} ({ms(times['min'])}-{ms(times['max'])})"


def failures(case: Mapping[str, Any]) -> str:
    return "".join(f"\n\n{name} failed: {why}" for name, why in case.get("failed", {}).items())


def peers(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith("jaxode")]


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    seen: dict[str, int] = {}
    result = {}
    for name in names:
        library = re.match(r"[a-z]+", name)
        key = library.group() if library else name
        seen[key] = seen.get(key, -1) + 1
        result[name] = {
            "color": COLORS.get(key, f"C{list(seen).index(key)}"),
            "linestyle": LINES[seen[key] % len(LINES)],
            "linewidth": 2.2 if key == "jaxode" else 1.3,
        }
    return result


def panels(
    count: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Figure, list[Axes]]:
    """So many axes of this width and height, in a grid."""
    rows = -(-count // columns)
    size = (max(7.0, width * columns), 0.8 + height * rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat[:count])


class Panel(NamedTuple):
    x: str
    y: str
    curves: Mapping[str, Points]
    title: str = ""


def curves(chosen: Sequence[Panel], columns: int = 2) -> Figure:
    """Curves by contender, in one style in all panels, the axes logarithmic."""
    figure, axes = panels(len(chosen), columns, 4.6, 2.7)
    style = styles(dict.fromkeys(name for panel in chosen for name in panel.curves))
    for axis, panel in zip(axes, chosen, strict=True):
        for name, points in panel.curves.items():
            lines = {"marker": "o", "markersize": 3.5, "label": name, **style[name]}
            axis.loglog(*zip(*points, strict=True), **lines)
        axis.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
    return figure


def bars(groups: Mapping[str, Mapping[str, float]], unit: str) -> Figure:
    """Horizontal bars with their values, one panel for each group."""
    sizes = [max(len(group), 2) for group in groups.values()]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(7.0, 0.6 + 0.75 * len(groups) + 0.26 * sum(sizes)), squeeze=False,
        layout="constrained", height_ratios=sizes,
    )  # fmt: skip
    for axis, (title, group) in zip(axes.flat, groups.items(), strict=True):
        libraries = [re.split(r"[^a-z]", name)[0] for name in group]
        colors = [COLORS.get(library, "#555555") for library in libraries]
        drawn = axis.barh(list(group), list(group.values()), color=colors, height=0.7)
        axis.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set(title=title, xlabel=unit)
    return figure


def save(figure: Figure, title: str, path: str | Path) -> None:
    """Dress the axes, add one legend for those that have none, and write the picture."""
    handles = {}
    for axis in figure.axes:
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
        if axis.get_legend() is None:
            drawn, names = axis.get_legend_handles_labels()
            handles |= dict(zip(names, drawn, strict=True))
    figure.suptitle(figure.get_suptitle() or title, fontsize=11)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=8,
        frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)
