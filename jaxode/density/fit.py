"""Train a density on data: flow matching, rows set aside to stop, the best parameters kept.

The losses are those of `density.flow` on the rows of `density.to_flow`, with any optimizer of
Optax: docs/training.md has the same as a short loop of one's own.
"""

import contextlib
import dataclasses
import functools
import math
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxode._checks.arguments import check_number, integer, non_negative
from jaxode._checks.caller import public
from jaxode._checks.rules import POSITIVE
from jaxode._checks.samples import check_key
from jaxode._jax.closure import compiled
from jaxode.coupling import Coupling, independent
from jaxode.density.bind import Density
from jaxode.density.standardize import as_map
from jaxode.density.table import WIDEST, Rows, Table, to_flow
from jaxode.divergence import auto, noiseless
from jaxode.flows.cnf import CNF
from jaxode.standardize import affine, normal, whiten

TIME_POWERS = (2.0, 1.0)  # of `matching_loss`, to try
RATE, RATE_AFTER = 8e-3, 5e-4  # of Adam, in matching and in the likelihood after it
WARM = 100  # steps of matching in which the updates grow to their size
AVERAGE = 0.002  # the least weight of a step in the moving average of the parameters
BLOCK = 50  # steps in one compiled loop
FIRST_LOOK, APART = 500, 1.3  # steps before the first look, and the ratio from each to the next
PATIENCE, WORSE = 5, 0.02  # looks that are so many nats worse, after which training ends early;
UNCOUNTED = 1000  # those of the first steps do not count
APART_SECONDS = 10.0  # from one look to the next at most, where `seconds` are given
TRIAL, SHORTEST = 0.05, 500  # the part of training in which each choice is tried; the least steps
MINUTE = 60.0  # seconds, if there is no other end
EXACT_UP_TO, LOOSE = 16, 1e-3  # dimensions of a look with the exact trace, and its tolerance


class Point(NamedTuple):
    """A look at the validation rows."""

    phase: str
    step: int
    seconds: float
    """Since the call, with compilation."""
    nats: float
    """Mean negative log-density of the validation rows, in the units of the data.

    At a tolerance of 1e-3, and with one probe of the divergence in more than 16 dimensions.
    """


@public("fit")
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
    after `seconds` or `steps`, a minute by default. After five looks in a row that are worse than
    the best by 0.02 nats, training resumes from the best parameters and ends after as many steps
    again. Ctrl-C ends it with the best so far.

    What is not given is tried first, each for 5% of the training, and the best goes on: the map of
    the columns of a density without `standardize=`, each of `jaxode.standardize`; and the
    `time_power`, 2 or 1. More times near the data make tables better, and small sets of images
    worse.

    Args:
        density: made by `jaxode.bind`. Training starts from its parameters.
        x: data in their own units, `[rows, *event]`.
        key: draws everything: the rows set aside, batches, base samples and noise.
        context: one row for each of `x`.
        seconds: end after about this time, compilation counted.
        steps: end after this many steps. Without `seconds`, the result is a function of `key`.
        validation: the part of the rows to set aside, or other rows: `x`, or `(x, context)`. At
            most 1000 of them are used.
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
        The density with the best parameters, and the looks at the validation rows in its training.
        These rows have chosen the parameters, so report the score of others. To go on, call it
        again with the density; the state of the optimizer is not kept.

    Raises:
        TypeError, ValueError: for an invalid argument.
        FloatingPointError: if no look is finite.

    Warns:
        UserWarning: of columns that have no density: they repeat values, or depend linearly on each
            other; and of a training that explodes.
    """
    begin = time.perf_counter()
    if not isinstance(density, Density):
        raise TypeError(
            f"fit(density=...): must be made by jaxode.bind; got {type(density).__name__}. Pass "
            "jaxode.bind(flow, params)."
        )
    key = check_key(key)
    if seconds is None and steps is None:
        seconds = MINUTE
    end = math.inf
    if seconds is not None:
        end = begin + non_negative("seconds", seconds, "a finite number of seconds")
    most = math.inf if steps is None else integer("steps", steps)
    batch = integer("batch", batch)
    likelihood = integer("likelihood", likelihood, 0, "a number of steps")
    powers = TIME_POWERS
    if time_power is not None:
        check_number("time_power", time_power, POSITIVE)
        powers = (time_power,)
    optimizer = _adam(RATE) if optimizer is None else optimizer
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"fit(optimizer=...): must be an optimizer of Optax; got {optimizer!r}. Pass "
            "optax.adam(1e-3)."
        )
    keys = iter(jax.random.split(key, 6))
    density = _trainable(density)
    table = Table.of(density, x, context, validation, dequantize, next(keys))
    aside, noise_key = table.aside(next(keys)), next(keys)
    flow = dataclasses.replace(density.flow, throw=False)
    matching_key, look_key = next(keys), next(keys)
    phases = [
        _Phase("matching", _Matching(flow, coupling, power), optimizer, matching_key, WARM)
        for power in powers
    ]
    maps = [density]
    if density.standardize is None:
        sample = np.asarray(table.drawn(noise_key).x)
        maps = _mapped(density, sample)
    start = lambda density, data: _Training(density, data, aside, batch, look_key, begin, progress)
    runs = [start(each, table.mapper(each, noise_key)) for each in maps]
    run = runs[0]
    try:
        if len(maps) * len(powers) > 1:
            for run in runs:
                run.train(phases[0], most, end, TRIAL)
            best = _best(runs)
            for other in phases[1:]:
                run = start(best.density, best.data)
                runs = [best, run]
                run.train(other, most, end, TRIAL)
                # Early on both look alike, and the first is better later.
                best = run if run.least < best.least - WORSE else best
            runs = [best]
        run = _best(runs)
        run.train(run.phase or phases[0], most, end)
        if likelihood:
            after = _Phase("likelihood", _Likelihood(flow), _adam(RATE_AFTER), next(keys))
            run.train(after, likelihood, math.inf)
    except KeyboardInterrupt:
        run.look_again()
        run = _best(runs)
        if run.least == math.inf:
            raise
    if progress:
        print(file=sys.stderr)
    if run.least == math.inf:
        raise FloatingPointError(
            "fit: the log-density of the validation rows is never finite. One row is enough "
            "for that. Check the data for outliers, or tighten rtol and atol of the flow."
        )
    bad = [point.step for point in run.points if not math.isfinite(point.nats)]
    if bad:
        warnings.warn(
            f"fit: the log-density of the validation rows is not finite at step {bad[0]}. The best "
            "parameters are kept. Lower the rate of the optimizer.",
            stacklevel=2,
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
    key: PRNGKeyArray
    warm: int = 1
    """Steps in which the updates grow to their size."""


class _State(NamedTuple):
    arrays: PyTree
    """The floating arrays of the parameters."""
    average: PyTree
    optimizer: Any
    count: Int[Array, ""]


@compiled
def _advance(loss, optimizer, batch: int, static: PyTree, state: _State, rates, rows: Rows, keys):
    """The state after a step of the optimizer for each key."""
    rate, warm = rates  # the part of an update that is made, and the steps of the warm-up

    def step(state, key):
        row_key, key = jax.random.split(key)
        drawn = jax.random.randint(row_key, (batch,), 0, len(rows.x))
        x, context = jax.tree.map(lambda leaf: leaf[drawn], rows)
        of_arrays = lambda arrays: loss(eqx.combine(arrays, static), x, context, key)
        gradient = jax.grad(of_arrays)(state.arrays)
        updates, inner = optimizer.update(gradient, state.optimizer, state.arrays)
        now = rate * jnp.minimum(1.0, (state.count + 1) / warm)
        arrays = jax.tree.map(lambda a, u: a + now.astype(a.dtype) * u, state.arrays, updates)
        # The mean of the last tenth of the steps, at most of the last 500.
        weight = jnp.maximum(AVERAGE, 10 / (10 + state.count))
        mean = lambda a, b: a + (b - a) * weight.astype(a.dtype)
        average = jax.tree.map(mean, state.average, arrays)
        return _State(arrays, average, inner, state.count + 1), None

    return jax.lax.scan(step, state, keys)[0]


@compiled
def _nll(flow: CNF, params: PyTree, rows: Rows, key: PRNGKeyArray) -> Float[Array, ""]:
    return flow.nll(params, rows.x, key=key, context=rows.context)


class _Training:
    """Parameters in training, and the best that the validation rows have seen."""

    def __init__(self, density, data, aside: Rows, batch: int, look_key, begin, progress):
        flow, size = density.flow, math.prod(density.event_shape)
        loose = lambda value: jnp.maximum(jnp.asarray(value, float), LOOSE)
        options = flow.solve_options
        options = dataclasses.replace(options, rtol=loose(options.rtol), atol=loose(options.atol))
        self.judge = dataclasses.replace(
            flow, regularizers=(), steer=0.0, throw=False, solve_options=options,
            divergence=noiseless() if size <= EXACT_UP_TO else auto(),
        )  # fmt: skip
        self.aside, self.look_key = to_flow(density, aside), look_key
        self.log_det = float(jnp.mean(density.log_det(aside.x)))
        self.data, self.batch = data, batch
        self.begin, self.progress = begin, progress
        self.density = self.best = density
        self.least, self.points = math.inf, []
        self.phase: Any = None
        self.blocks = 0  # so far, also of those that were taken back

    def start(self, phase: _Phase) -> None:
        """Begin a phase from the best parameters."""
        self.phase, self.step, self.stale = phase, 0, 0
        self.static = eqx.filter(self.best.params, eqx.is_inexact_array, inverse=True)
        arrays = eqx.filter(self.best.params, eqx.is_inexact_array)
        self.state = _State(arrays, arrays, phase.optimizer.init(arrays), jnp.zeros((), jnp.int32))
        self.began, self.early, self.left = time.perf_counter(), None, 1.0
        self.kept = self.step, self.state, self.left
        self.look()

    def train(self, phase: _Phase, most: float, end: float, part: float = math.inf) -> None:
        """Train up to `most` steps of the phase, up to the time `end`, or for a part of both."""
        if phase is not self.phase:
            self.start(phase)
        pause, until = self.step + min(max(part * most, SHORTEST), 4 * part * most), None
        self.left = self.part_left(most, end)
        while self.left > 0 and self.step < pause:
            self.block(int(min(BLOCK, most - self.step)))
            now = time.perf_counter()
            if until is None:  # time counts from here, since the first block may have compiled
                until = now + part * (end - self.begin)
                self.began = now if self.step <= BLOCK else self.began
            waited = end < math.inf and now > self.looked + APART_SECONDS
            if self.step >= min(self.due, most) or waited:
                self.look()
            if not self.early and self.stale >= PATIENCE:
                # As many steps again, from where it was best.
                self.step, self.state, left = self.kept
                self.early = self.step, left
                self.due = APART * self.step
            self.left = self.part_left(most, end)
            if now >= until:
                break
        self.look_again()

    def block(self, count: int) -> None:
        """Take so many steps."""
        block_key = jax.random.fold_in(self.phase.key, self.blocks)
        rows, keys = self.data(block_key), jax.random.split(block_key, count)
        rates = jnp.sin(0.5 * jnp.pi * self.left) ** 2, jnp.asarray(self.phase.warm, jnp.int32)
        loss, optimizer = self.phase.loss, self.phase.optimizer
        self.state = jax.block_until_ready(
            _advance(loss, optimizer, self.batch, self.static, self.state, rates, rows, keys)
        )
        self.step, self.blocks = self.step + count, self.blocks + 1

    def part_left(self, most: float, end: float) -> float:
        """The part of training that is left."""
        of_time, now = 1.0, time.perf_counter()
        if end < math.inf:
            of_time = (end - now) / (end - self.began) if now < end else 0.0
        if self.early is None:
            return min(1 - self.step / most, of_time)
        best, left = self.early
        return min(left * (2 - self.step / best) if best else 0.0, of_time)

    def look_again(self) -> None:
        """Look at what came after the last look."""
        if self.points and self.points[-1].step != self.step:
            self.look()

    def look(self) -> None:
        """Evaluate the average on the validation rows."""
        params = eqx.combine(self.state.average, self.static)
        nats = float(_nll(self.judge, params, self.aside, self.look_key)) - self.log_det
        self.looked = time.perf_counter()
        self.due = max(FIRST_LOOK, APART * self.step)
        worse = self.step > UNCOUNTED and not nats <= self.least + WORSE
        self.stale = self.stale + 1 if worse else 0
        if nats < self.least:
            self.best, self.least = self.best.with_params(params), nats
            self.kept = self.step, self.state, self.left
        self.points.append(Point(self.phase.name, self.step, self.looked - self.begin, nats))
        if self.progress:
            text = f"\r{self.phase.name}: step {self.step}, {nats:.3f} nats of validation rows"
            print(f"{text}, best {self.least:.3f} ", end="", file=sys.stderr, flush=True)


def _best(runs: list[_Training]) -> _Training:
    return min(runs, key=lambda run: run.least)


def _trainable(density: Density) -> Density:
    """The density with Python's numbers among its parameters as arrays."""
    as_array = lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float) else leaf
    params = jax.tree.map(as_array, density.params)
    if not any(map(eqx.is_inexact_array, jax.tree.leaves(params))):
        raise TypeError(
            "fit(density=...): its parameters must hold floating arrays, to train them; got none. "
            "Pass the network itself as params of bind."
        )
    return density.with_params(params)


def _mapped(density: Density, data: np.ndarray) -> list[Density]:
    """The density with each map that can be fitted to the data."""
    fitted = lambda kind: as_map("x", kind(data), density.event_shape, density.support)
    maps = [fitted(affine), fitted(normal)]
    if math.prod(density.event_shape) <= WIDEST:
        with contextlib.suppress(ValueError):  # a singular covariance
            maps.append(fitted(whiten))
    return [dataclasses.replace(density, standardize=each) for each in maps]
