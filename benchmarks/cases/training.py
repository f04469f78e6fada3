"""The table and the curves of docs/training.md: what each choice of `jaxode.fit` is worth.

    python -m benchmarks.cases.training      five minutes on two cores

Every row changes one thing of the default, and trains for the same number of steps, seed 0. Tables
and split are those of `tables`. Writes docs/images/training.png and prints the table.
"""

from typing import Any

import jax
import matplotlib.pyplot as plt
import optax

import jaxode
from benchmarks.harness import show
from benchmarks.harness.machine import ROOT
from benchmarks.harness.table_data import TABLES, prepare

PICTURE = ROOT / "docs" / "images" / "training.png"
DATA, STEPS = ("magic", "phoneme"), 5000

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


def trained(name: str, network=lambda n, key: Residual(n, key=key), map=None, **options):
    """The score of the test rows, and what the validation rows saw."""
    table = prepare(TABLES[name]())
    dim, (start_key, key) = table.train.shape[1], jax.random.split(jax.random.key(0))
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(dim))
    standardize = None if map is None else map(table.train)
    density = jaxode.bind(flow, network(dim, start_key), standardize=standardize)
    options = {"steps": STEPS, "validation": table.validation, "progress": False} | options
    density, points = jaxode.fit(density, table.train, key=key, **options)
    return -float(density.log_prob(table.test).mean()), points


def report(found: dict[tuple[str, str], tuple[float, list[Any]]]) -> None:
    """Draw what the validation rows saw, and print the scores of the test rows."""
    figure = plt.figure(figsize=(11, 4.5), layout="constrained")
    axes: Any = figure.subplots(1, len(DATA))
    for axis, name in zip(axes, DATA, strict=True):
        for i, choice in enumerate(CHOICES):
            points = [(p.seconds, p.nats) for p in found[name, choice][1] if p.step]
            style = "--" if i >= 10 else "-"  # the colors repeat
            axis.plot(*zip(*points, strict=True), style, label=choice, linewidth=1.2)
        best = min(found[name, choice][0] for choice in CHOICES)
        axis.set(title=name, xlabel="seconds, with compilation", ylim=(best - 0.3, best + 1.5))
        axis.grid(color="#dddddd", linewidth=0.6)
    axes[0].set(ylabel="nats of validation rows")
    axes[-1].legend(fontsize=7, frameon=False)
    figure.savefig(PICTURE, dpi=110)
    cell = lambda name, choice: (
        f"{found[name, choice][0]:.3f}, {found[name, choice][1][-1].seconds:.0f} s"
    )
    rows = [[choice, *(cell(name, choice) for name in DATA)] for choice in CHOICES]
    print(show.markdown([f"held-out nats after {STEPS} steps", *DATA], rows))


def main() -> None:
    report(
        {(name, choice): trained(name, **CHOICES[choice]) for name in DATA for choice in CHOICES}
    )


if __name__ == "__main__":
    main()
