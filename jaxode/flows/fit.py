"""Train a density on data: flow matching, rows set aside to stop, the best parameters kept.

It is built on public functions, so that it can be copied and changed: losses of `density.flow` on
the rows of `density.to_flow`, and any optimizer of Optax.
"""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxode.coupling import Coupling, independent
from jaxode.divergence import auto, noiseless
from jaxode.flows.cnf import CNF
from jaxode.flows.density import Density
from jaxode.flows.standardize import as_map
from jaxode.flows.table import Rows, dequantized, is_integer, set_aside, to_flow, warn_of_columns
from jaxode.flows.validation import check_key
from jaxode.ode.options import SolveOptions
from jaxode.ode.validation import check_positive, integer, non_negative
from jaxode.standardize import Unfitted, affine, normal

TIME_POWERS = (2.0, 1.0)  # of `matching_loss`, to try
RATE, RATE_AFTER = 8e-3, 5e-4  # of Adam, in matching and in the likelihood after it
WARM = 100  # steps in which the updates grow to their size
AVERAGE = 0.002  # the least weight of a step in the moving average of the parameters
BLOCK = 50  # steps in one compiled loop
FIRST_LOOK, APART = 500, 1.3  # steps before the first look, and the ratio from each to the next
PATIENCE, WORSE = 5, 0.02  # looks that are so many nats worse, after which training ends early;
UNCOUNTED = 1000  # those of the first steps do not count
TRIAL = 0.06  # the part of training in which each choice is tried
MINUTE = 60.0  # seconds, if there is no other end
EXACT_UP_TO, LOOSE = 16, 1e-3  # dimensions of a look with the exact trace, and its tolerance


class Point(NamedTuple):
    """A look at the validation rows."""

    phase: str
    step: int
    seconds: float
    """Since the call, with compilation."""
    nats: float
    """Mean negative log-density of the validation rows, in the units of the data."""


def fit(
    density: Density,
    x: Float[Array, "rows *event"],
    *,
    key: PRNGKeyArray,
    context: PyTree = None,
    seconds: float | None = None,
    steps: int | None = None,
    validation: float | Any = 0.1,
    batch: int = 512,
    optimizer: Any = None,
    coupling: Coupling = independent(),
    likelihood: int = 0,
    time_power: float | None = None,
    dequantize: bool = False,
    progress: bool = True,
) -> tuple[Density, list[Point]]:
    """Train a density on data, and keep the parameters that are best on rows set aside.

    By flow matching. At steps that are 30% apart, a moving average of the parameters is evaluated
    on the validation rows. The updates of the optimizer shrink to zero by a cosine up to the end:
    after `seconds` or `steps`, a minute by default. If it overfits, five looks in a row worse than
    the best, training goes back to the best parameters and to an early end. Ctrl-C ends it at once.

    What is not given is tried first, each for 6% of the training, and the best goes on: the map of
    the columns, affine or `jaxode.standardize.normal`, of a density without `standardize=`; and the
    `time_power`, 2 or 1. More times near the data make tables better, and small sets of images
    worse.

    Args:
        density: made by `jaxode.bind`. Training starts from its parameters.
        x: data in their own units, `[rows, *event]`.
        key: draws everything: the rows set aside, batches, base samples and noise.
        context: one row for each of `x`.
        seconds: end after about this time, compilation counted.
        steps: end after this many steps. The result is then a function of `key`.
        validation: the part of the rows to set aside, or other rows: `x`, or `(x, context)`.
        batch: rows in a step, drawn with replacement.
        optimizer: of Optax, for matching. Adam at 8e-3 by default.
        coupling: which base sample goes with which row, as for `matching_loss`.
        likelihood: steps of maximum likelihood after matching and its `seconds`, from the best
            parameters, with Adam at 5e-4.
        time_power: as for `matching_loss`.
        dequantize: add uniform noise in [0, 1) to columns of integers, new in every block of steps.
            `log_prob` is then that of `x + noise`.
        progress: show steps and nats on stderr.

    Returns:
        The density with the best parameters, and all looks at the validation rows. These rows have
        chosen the parameters, so report the score of others. To go on, call it again with the
        density; the state of the optimizer is not kept.

    Raises:
        TypeError, ValueError: for an invalid argument.
        FloatingPointError: if no look is finite.

    Warns:
        UserWarning: of columns that have no density: they repeat values, or depend linearly on each
            other.
    """
    begin = time.perf_counter()
    if not isinstance(density, Density):
        raise TypeError(
            f"fit(density=...): must be made by jaxode.bind; got {type(density).__name__}. Pass "
            "jaxode.bind(flow, params)."
        )
    key = check_key("fit", key)
    if seconds is None and steps is None:
        seconds = MINUTE
    end = math.inf
    if seconds is not None:
        end = begin + non_negative("fit", "seconds", seconds, "a finite number of seconds")
    most = math.inf if steps is None else integer("fit", "steps", steps)
    batch = integer("fit", "batch", batch)
    likelihood = integer("fit", "likelihood", likelihood, 0, "a number of steps")
    split_key, noise_key, look_key, key = jax.random.split(key, 4)
    rows, aside = set_aside(density, x, context, validation, dequantize, split_key)
    integers = is_integer(rows[0]) & bool(dequantize)
    columns = rows[0].reshape(len(rows[0]), -1)
    warn_of_columns("fit", columns, np.flatnonzero(~integers.reshape(-1)))
    noisy = lambda key, rows: (dequantized(key, rows[0], integers), rows[1])
    aside = noisy(noise_key, aside)
    maps = [density]
    if density.standardize is None:
        table = np.asarray(noisy(noise_key, rows)[0])
        maps = [_mapped(density, kind(table)) for kind in (affine, normal)]
    powers = TIME_POWERS
    if time_power is not None:
        check_positive("fit", "time_power", time_power)
        powers = (time_power,)
    optimizer = optimizer or _adam(RATE)
    matching = [_Phase("matching", _Matching(density.flow, coupling, p), optimizer) for p in powers]

    def data(density: Density) -> Callable[[PRNGKeyArray], Rows]:
        if integers.any():
            return lambda key: to_flow(density, noisy(key, rows))
        mapped = to_flow(density, rows)
        return lambda key: mapped

    start = lambda density: _Training(
        density, data(density), aside, batch, look_key, key, begin, progress
    )
    runs = [start(each) for each in maps]
    run, phase = runs[0], matching[0]
    try:
        if len(maps) * len(powers) > 1:
            for each in runs:
                each.train(phase, most, end, TRIAL)
            run = min(runs, key=lambda run: run.least)
            for other in matching[1:]:
                runs.append(start(run.density))
                runs[-1].train(other, most, end, TRIAL)
                run = min(run, runs[-1], key=lambda run: run.least)
        run.train(run.phase or phase, most, end)
        if likelihood:
            after = _Phase("likelihood", _Likelihood(density.flow), _adam(RATE_AFTER))
            run.train(after, likelihood, math.inf)
    except KeyboardInterrupt:
        run = min(runs, key=lambda run: run.least)
        if not run.points:
            raise
    if progress:
        print(file=sys.stderr)
    if run.least == math.inf:
        raise FloatingPointError(
            "fit: the log-density of the validation rows is never finite. Check the data for "
            "outliers, or lower the rate of the optimizer."
        )
    return run.best, run.points


class _Matching(eqx.Module):
    flow: CNF
    coupling: Coupling
    time_power: Float[Array, ""] = eqx.field(converter=jnp.asarray)  # an input of the program

    def __call__(self, params, x, context, key):
        options = {"context": context, "coupling": self.coupling, "time_power": self.time_power}
        return self.flow.matching_loss(params, x, key=key, **options)


class _Likelihood(eqx.Module):
    flow: CNF

    def __call__(self, params, x, context, key):
        return self.flow.nll(params, x, key=key, context=context)


@functools.cache
def _adam(rate: float) -> Any:
    """Adam; for the same rate the same object, which is not compiled again."""
    import optax

    return optax.adam(rate)


class _Phase(NamedTuple):
    name: str
    loss: Callable[..., Float[Array, ""]]
    """Of parameters, data, context and a key."""
    optimizer: Any


@eqx.filter_jit
def _advance(phase: _Phase, batch: int, static: PyTree, carry, rate, rows: Rows, keys):
    """`(arrays, average, state, count)` after a step of the optimizer for each key."""

    def step(carry, key):
        arrays, average, state, count = carry
        row_key, key = jax.random.split(key)
        drawn = jax.random.randint(row_key, (batch,), 0, len(rows[0]))
        x, context = jax.tree.map(lambda leaf: leaf[drawn], rows)
        gradient = jax.grad(lambda a: phase.loss(eqx.combine(a, static), x, context, key))(arrays)
        updates, state = phase.optimizer.update(gradient, state, arrays)
        now = rate * jnp.minimum(1.0, (count + 1) / WARM)
        arrays = jax.tree.map(lambda a, u: a + now.astype(a.dtype) * u, arrays, updates)
        # The mean of the last tenth of the steps, at most of the last 500.
        weight = jnp.maximum(AVERAGE, 10 / (10 + count))
        average = jax.tree.map(lambda a, b: a + (b - a) * weight.astype(a.dtype), average, arrays)
        return (arrays, average, state, count + 1), None

    return jax.lax.scan(step, carry, keys)[0]


@eqx.filter_jit
def _nll(flow: CNF, params: PyTree, rows: Rows, key: PRNGKeyArray) -> Float[Array, ""]:
    return flow.nll(params, rows[0], key=key, context=rows[1])


class _Training:
    """Parameters in training, and the best that the validation rows have seen."""

    def __init__(self, density, data, aside: Rows, batch: int, look_key, key, begin, progress):
        flow, size = density.flow, math.prod(density.event_shape)
        self.judge = dataclasses.replace(
            flow, regularizers=(), steer=0.0, throw=False, step_control="joint",
            solve_options=SolveOptions.make("fit", rtol=LOOSE, atol=LOOSE),
            divergence=noiseless() if size <= EXACT_UP_TO else auto(),
        )  # fmt: skip
        self.aside, self.look_key = to_flow(density, aside), look_key
        self.log_det = float(jnp.mean(density.log_det(aside[0])))
        self.data, self.batch, self.key = data, batch, key
        self.begin, self.progress = begin, progress
        self.density = self.best = density
        self.least, self.points = math.inf, []
        self.phase: Any = None

    def train(self, phase: _Phase, most: float, end: float, part: float = math.inf) -> None:
        """Train up to `most` steps of the phase, up to the time `end`, or for a part of both.

        A new phase starts from the best parameters.
        """
        if phase is not self.phase:
            self.phase, self.step, self.stale, self.due = phase, 0, 0, FIRST_LOOK
            self.static = eqx.filter(self.best.params, eqx.is_inexact_array, inverse=True)
            arrays = eqx.filter(self.best.params, eqx.is_inexact_array)
            state = phase.optimizer.init(arrays)
            self.carry = arrays, arrays, state, jnp.zeros((), jnp.int32)
            self.start, self.early, self.left = time.perf_counter(), None, 1.0
            self.kept = 0, self.carry, self.left
            self.look()
        pause, until = self.step + part * most, math.inf
        self.left = self.part_left(most, end)
        while self.left > 0 and self.step < pause and time.perf_counter() < until:
            count = int(min(BLOCK, most - self.step))
            of_step = jax.random.fold_in(jax.random.fold_in(self.key, len(phase.name)), self.step)
            noise_key, block_key = jax.random.split(of_step)
            inputs = self.data(noise_key), jax.random.split(block_key, count)
            rate = jnp.sin(0.5 * jnp.pi * self.left) ** 2
            self.carry = _advance(phase, self.batch, self.static, self.carry, rate, *inputs)
            self.step += count
            if self.step >= min(self.due, most):
                self.look()
            if not self.early and self.stale >= PATIENCE:
                # As many steps again, from where it was best.
                self.step, self.carry, left = self.kept
                self.early = self.step, left
            self.left = self.part_left(most, end)
            if until == math.inf:  # time counts from here, since the first block may have compiled
                now = time.perf_counter()
                until = now + part * (end - self.begin)
                self.start = now if self.step == count else self.start
        if self.points[-1].step != self.step:
            self.look()

    def part_left(self, most: float, end: float) -> float:
        """The part of training that is left."""
        jax.block_until_ready(self.carry)
        of_time, now = 1.0, time.perf_counter()
        if end < math.inf:
            of_time = (end - now) / (end - self.start) if now < end else 0.0
        if self.early is None:
            return min(1 - self.step / most, of_time)
        best, left = self.early
        return min(left * (2 - self.step / best) if best else 0.0, of_time)

    def look(self) -> None:
        """Evaluate the average on the validation rows."""
        params = eqx.combine(self.carry[1], self.static)
        nats = float(_nll(self.judge, params, self.aside, self.look_key)) - self.log_det
        seconds = time.perf_counter() - self.begin
        self.points.append(Point(self.phase.name, self.step, seconds, nats))
        self.due = math.ceil(max(FIRST_LOOK, APART * self.step))
        self.stale += self.step > UNCOUNTED and not nats <= self.least + WORSE
        if nats < self.least:
            self.best, self.least, self.stale = self.best.with_params(params), nats, 0
            self.kept = self.step, self.carry, self.left
        if self.progress:
            text = f"\r{self.phase.name}: step {self.step}, {nats:.3f} nats of validation rows"
            print(f"{text}, best {self.least:.3f}", end="", file=sys.stderr, flush=True)


def _mapped(density: Density, data: Unfitted) -> Density:
    """The density with a map fitted to the data."""
    fitted = as_map("x", data, density.event_shape, density.support)
    return dataclasses.replace(density, standardize=fitted)
