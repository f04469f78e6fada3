"""The curves of docs/training.md, and a table: what each choice of `jaxode.fit` is worth.

    python -m benchmarks.cases.training      half an hour on two cores

Every row changes one thing of the default, and trains for the same number of steps. Tables and
split are those of `tables`. Prints means over three seeds, and writes docs/images/training.png,
with the curves of the first.
"""

from statistics import mean, median, stdev
from typing import Any

import jax
import matplotlib.pyplot as plt
import optax

import jaxode
from benchmarks.harness import show
from benchmarks.harness.machine import ROOT
from benchmarks.harness.table_data import TABLES, prepare

PICTURE = ROOT / "docs" / "images" / "training.png"
DATA, STEPS, SEEDS = ("magic", "phoneme"), 5000, (0, 1, 2)

Run = tuple[float, list[Any]]
"""The score of the test rows, and looks at the validation rows."""
Found = dict[tuple[str, str], list[Run]]

Residual, ConcatSquash = jaxode.nn.Residual, jaxode.nn.ConcatSquash
CHOICES: dict[str, dict[str, Any]] = {
    "the default": {},
    "times uniform (time_power=1)": {"time_power": 1.0},
    "an affine map of the columns": {"map": jaxode.standardize.affine},
    "each column to a normal": {"map": jaxode.standardize.normal},
    "whitened": {"map": jaxode.standardize.whiten},
    "ConcatSquash(n, (128, 128))": {"network": lambda n, key: ConcatSquash(n, (128, 128), key=key)},
    "Residual, width 256": {"network": lambda n, key: Residual(n, 256, key=key)},
    "Residual, width 64": {"network": lambda n, key: Residual(n, 64, key=key)},
    "Adam at 2e-3": {"optimizer": optax.adam(2e-3)},
    "Adam at 2e-2": {"optimizer": optax.adam(2e-2)},
    "transport in groups of 16": {"coupling": jaxode.coupling.optimal_transport(16)},
    "40 steps of likelihood after it": {"likelihood": 40},
}


def trained(
    name: str, seed: int, network=lambda n, key: Residual(n, key=key), map=None, **options
) -> Run:
    table = prepare(TABLES[name]())
    dim, (start_key, key) = table.train.shape[1], jax.random.split(jax.random.key(seed))
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(dim))
    standardize = None if map is None else map(table.train)
    density = jaxode.bind(flow, network(dim, start_key), standardize=standardize)
    options = {"steps": STEPS, "validation": table.validation, "progress": False} | options
    density, points = jaxode.fit(density, table.train, key=key, **options)
    return -float(density.log_prob(table.test).mean()), points


def draw(found: Found) -> None:
    """What the validation rows saw, of the first seed."""
    figure = plt.figure(figsize=(11, 4.5), layout="constrained")
    axes: Any = figure.subplots(1, len(DATA))
    for axis, name in zip(axes, DATA, strict=True):
        first = {choice: found[name, choice][0] for choice in CHOICES}
        for i, (choice, (_, looks)) in enumerate(first.items()):
            points = [(p.seconds, p.nats) for p in looks if p.step]
            style = "--" if i >= 10 else "-"  # the colors repeat
            axis.plot(*zip(*points, strict=True), style, label=choice, linewidth=1.2)
        best = min(nats for nats, _ in first.values())
        axis.set(title=name, xlabel="seconds, with compilation", ylim=(best - 0.3, best + 1.5))
        axis.grid(color="#dddddd", linewidth=0.6)
    axes[0].set(ylabel="validation loss in nats")
    axes[-1].legend(fontsize=7, frameon=False)
    figure.savefig(PICTURE, dpi=110)


def cell(runs: list[Run]) -> str:
    """Mean and standard deviation over the seeds, and the median time."""
    nats, seconds = [nats for nats, _ in runs], [looks[-1].seconds for _, looks in runs]
    return f"{mean(nats):.3f} +- {stdev(nats):.3f}, {median(seconds):.0f} s"


def main() -> None:
    found = {
        (name, choice): [trained(name, seed, **CHOICES[choice]) for seed in SEEDS]
        for name in DATA
        for choice in CHOICES
    }
    draw(found)
    rows = [[choice, *(cell(found[name, choice]) for name in DATA)] for choice in CHOICES]
    print(show.markdown([f"held-out nats after {STEPS} steps", *DATA], rows))


if __name__ == "__main__":
    main()
