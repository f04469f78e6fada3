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
from jaxode.flows.columns import dequantized, is_integer, warn_of_columns
from jaxode.flows.density import Density
from jaxode.flows.standardize import as_map, check_inside, floating, numbers
from jaxode.flows.validation import check_context, check_finite, check_key
from jaxode.ode.options import SolveOptions
from jaxode.ode.validation import integer, non_negative, real_scalar, shape_of
from jaxode.standardize import Unfitted, affine, normal

TIME_POWER = 2.0  # of `matching_loss`
RATE, RATE_AFTER = 2e-3, 5e-4  # of Adam, in matching and in the likelihood after it
AVERAGE = 0.002  # the least weight of a step in the moving average of the parameters
BLOCK = 50  # steps in one compiled loop
FIRST_LOOK, APART = 250, 1.15  # steps before the first look, and the ratio from each to the next
PATIENCE = 6  # looks without an improvement, after which training ends
TRIAL, TRIAL_STEPS = 0.08, 1000  # the part of `seconds`, or the steps, in which a map is tried
LOOK_AT, LEAST_ROWS = 1000, 10  # validation rows; rows of any kind
EXACT_UP_TO, LOOSE = 16, 1e-3  # their dimensions with an exact trace, and the tolerance

Rows = tuple[Any, PyTree]  # data `[rows, *event]`; the context of each row, or None
Loss = Callable[..., Float[Array, ""]]  # of parameters, data, context and a key


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
    dequantize: bool = False,
    progress: bool = True,
) -> tuple[Density, list[Point]]:
    """Train a density on data, and keep the parameters that are best on rows set aside.

    By flow matching, with more times near the data than near the base. At steps that are 15% apart,
    a moving average of the parameters is evaluated on the validation rows. Training ends when twice
    as many steps brought no improvement, after `steps` or `seconds`, or with Ctrl-C.

    A density without `standardize=` gets a map of its columns, affine or
    `jaxode.standardize.normal`: both are tried for a short time, and the better one goes on.

    Args:
        density: made by `jaxode.bind`. Training starts from its parameters.
        x: data in their own units, `[rows, *event]`.
        key: draws everything: the rows set aside, batches, base samples and noise.
        context: one row for each of `x`.
        seconds: end after about this time, compilation counted.
        steps: end after this many steps. The result is then a function of `key`.
        validation: the part of the rows to set aside, or other rows: `x`, or `(x, context)`.
        batch: rows in a step, drawn with replacement.
        optimizer: of Optax, for matching. Adam at 2e-3 by default.
        coupling: which base sample goes with which row, as for `matching_loss`.
        likelihood: steps of maximum likelihood after matching, from the best parameters, with Adam
            at a rate that falls to zero.
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
    end = math.inf
    if seconds is not None:
        end = begin + non_negative("fit", "seconds", seconds, "a finite number of seconds")
    most = math.inf if steps is None else integer("fit", "steps", steps)
    batch = integer("fit", "batch", batch)
    likelihood = integer("fit", "likelihood", likelihood, 0, "a number of steps")
    split_key, noise_key, look_key, key = jax.random.split(key, 4)
    rows, aside = _set_aside(density, x, context, validation, dequantize, split_key)
    integers = is_integer(rows[0]) & bool(dequantize)
    columns = rows[0].reshape(len(rows[0]), -1)
    warn_of_columns("fit", columns, np.flatnonzero(~integers.reshape(-1)))
    noisy = lambda key, rows: (dequantized(key, rows[0], integers), rows[1])
    aside = noisy(noise_key, aside)
    candidates = [density]
    if density.standardize is None:
        table = np.asarray(noisy(noise_key, rows)[0])
        candidates = [_mapped(density, kind(table)) for kind in (affine, normal)]
    loss = _Matching(density.flow, coupling)

    def data(density: Density) -> Callable[[PRNGKeyArray], Rows]:
        if integers.any():
            return lambda key: _to_flow(density, noisy(key, rows))
        mapped = _to_flow(density, rows)
        return lambda key: mapped

    runs = [
        _Training(_Looks(each, aside, look_key, begin, progress), data(each), batch, key)
        for each in candidates
    ]
    run, optimizer = runs[0], optimizer or _adam(RATE)
    try:
        if len(runs) > 1:
            run.train("matching", loss, optimizer, BLOCK, end)  # compiles
            tried = min(most, TRIAL_STEPS if seconds is None else math.inf)
            for each in runs:
                until = min(end, time.perf_counter() + TRIAL * (end - begin))
                tried = each.train("matching", loss, optimizer, tried, until)
            run = min(runs, key=lambda run: run.looks.least)
        run.train("matching", loss, optimizer, most, end)
        if likelihood:
            run.looks.stale = 0
            run = _Training(run.looks, run.data, batch, jax.random.fold_in(key, 0))
            after = _adam(RATE_AFTER, likelihood)
            run.train("likelihood", _Likelihood(density.flow), after, likelihood, end)
    except KeyboardInterrupt:
        run = min(runs, key=lambda run: run.looks.least)
        if not run.looks.points:
            raise
    if progress:
        print(file=sys.stderr)
    if run.looks.least == math.inf:
        raise FloatingPointError(
            "fit: the log-density of the validation rows is never finite. Check the data for "
            "outliers, or lower the rate of the optimizer."
        )
    return run.looks.best, run.looks.points


class _Matching(eqx.Module):
    flow: CNF
    coupling: Coupling

    def __call__(self, params, x, context, key):
        options = {"context": context, "coupling": self.coupling, "time_power": TIME_POWER}
        return self.flow.matching_loss(params, x, key=key, **options)


class _Likelihood(eqx.Module):
    flow: CNF

    def __call__(self, params, x, context, key):
        return self.flow.nll(params, x, key=key, context=context)


@functools.cache
def _adam(rate: float, steps: int | None = None) -> Any:
    """Adam, at a rate that falls to zero in so many steps. The same object again is not compiled
    again."""
    import optax

    return optax.adam(rate if steps is None else optax.cosine_decay_schedule(rate, steps))


@eqx.filter_jit
def _advance(loss: Loss, optimizer: Any, batch: int, carry, rows: Rows, keys):
    """`(params, average, state, count)` after a step of the optimizer for each key."""
    params, *carry = carry
    arrays, static = eqx.partition(params, eqx.is_inexact_array)

    def step(carry, key):
        arrays, average, state, count = carry
        row_key, key = jax.random.split(key)
        drawn = jax.random.randint(row_key, (batch,), 0, len(rows[0]))
        x, context = jax.tree.map(lambda leaf: leaf[drawn], rows)
        gradient = jax.grad(lambda a: loss(eqx.combine(a, static), x, context, key))(arrays)
        updates, state = optimizer.update(gradient, state, arrays)
        arrays = eqx.apply_updates(arrays, updates)
        # The mean of the last tenth of the steps, at most of the last 500.
        weight = jnp.maximum(AVERAGE, 10 / (10 + count))
        average = jax.tree.map(lambda a, b: a + (b - a) * weight.astype(a.dtype), average, arrays)
        return (arrays, average, state, count + 1), None

    (arrays, *carry), _ = jax.lax.scan(step, (arrays, *carry), keys)
    return eqx.combine(arrays, static), *carry


class _Looks:
    """The validation rows, and the best parameters that they have seen."""

    def __init__(self, density: Density, aside: Rows, key, begin: float, progress: bool):
        flow, size = density.flow, math.prod(density.event_shape)
        self.flow = dataclasses.replace(
            flow, regularizers=(), steer=0.0, throw=False, step_control="joint",
            solve_options=SolveOptions.make("fit", rtol=LOOSE, atol=LOOSE),
            divergence=noiseless() if size <= EXACT_UP_TO else auto(),
        )  # fmt: skip
        self.rows, self.key = _to_flow(density, aside), key
        self.log_det = float(jnp.mean(density.log_det(aside[0])))
        self.begin, self.progress = begin, progress
        self.best, self.least, self.stale, self.points = density, math.inf, 0, []

    def look(self, phase: str, step: int, params: PyTree) -> None:
        nats = float(_nll(self.flow, params, self.rows, self.key)) - self.log_det
        self.points.append(Point(phase, step, time.perf_counter() - self.begin, nats))
        self.stale += 1
        if nats < self.least:
            self.best, self.least, self.stale = self.best.with_params(params), nats, 0
        if self.progress:
            text = f"\r{phase}: step {step}, {nats:.3f} nats of validation rows"
            print(f"{text}, best {self.least:.3f}", end="", file=sys.stderr, flush=True)


@eqx.filter_jit
def _nll(flow: CNF, params: PyTree, rows: Rows, key: PRNGKeyArray) -> Float[Array, ""]:
    return flow.nll(params, rows[0], key=key, context=rows[1])


class _Training:
    """Parameters in training, from the best that was seen so far."""

    def __init__(
        self, looks: _Looks, data: Callable[[PRNGKeyArray], Rows], batch: int, key: PRNGKeyArray
    ):
        self.looks, self.data, self.batch, self.key = looks, data, batch, key
        self.carry: Any = None
        self.step, self.due = 0, FIRST_LOOK

    def train(self, phase: str, loss: Loss, optimizer: Any, most: float, end: float) -> int:
        """Steps up to `most` in all, until `end`, or until the validation rows see no more.

        Returns the number of steps.
        """
        if self.carry is None:
            params = self.looks.best.params
            arrays = eqx.filter(params, eqx.is_inexact_array)
            self.carry = params, arrays, optimizer.init(arrays), jnp.zeros((), jnp.int32)
            self.looks.look(phase, 0, params)
        while self.step < most and time.perf_counter() < end and self.looks.stale < PATIENCE:
            count = int(min(BLOCK, most - self.step))
            noise_key, block_key = jax.random.split(jax.random.fold_in(self.key, self.step))
            rows = self.data(noise_key)
            keys = jax.random.split(block_key, count)
            self.carry = _advance(loss, optimizer, self.batch, self.carry, rows, keys)
            self.step += count
            if self.step >= self.due:
                self.look(phase)
        if self.looks.points[-1].step < self.step:
            self.look(phase)
        return self.step

    def look(self, phase: str) -> None:
        params, average, *_ = self.carry
        static = eqx.filter(params, eqx.is_inexact_array, inverse=True)
        self.looks.look(phase, self.step, eqx.combine(average, static))
        self.due = max(self.step + BLOCK, math.ceil(APART * self.step))


def _mapped(density: Density, data: Unfitted) -> Density:
    """The density with a map fitted to the data."""
    fitted = as_map("x", data, density.event_shape, density.support)
    return dataclasses.replace(density, standardize=fitted)


def _to_flow(density: Density, rows: Rows) -> Rows:
    z = density.to_flow(*rows)
    return (z, None) if rows[1] is None else z


def _set_aside(
    density: Density,
    x: Any,
    context: PyTree,
    validation: Any,
    dequantize: bool,
    key: PRNGKeyArray,
) -> tuple[Rows, Rows]:
    """Rows to train on, and validation rows, at most `LOOK_AT` of them if they are drawn here."""
    rows = _checked("x", density, x, context, dequantize)
    if not isinstance(validation, int | float | np.number):
        of_x, of_context = validation if isinstance(validation, tuple) else (validation, None)
        return rows, _checked("validation", density, of_x, of_context, dequantize)
    real_scalar("fit", "validation", validation, "between 0 and 1", lambda v: 0 < v < 1, "part")
    count = min(math.ceil(validation * len(rows[0])), LOOK_AT, len(rows[0]) - 2)
    order = np.asarray(jax.random.permutation(key, len(rows[0])))
    part = lambda chosen: jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], rows)
    return part(order[count:]), part(order[:count])


def _checked(name: str, density: Density, x: Any, context: PyTree, dequantize: bool) -> Rows:
    x, event = floating(numbers(f"fit({name}=...):", x)), density.event_shape
    if x.ndim != len(event) + 1 or x.shape[1:] != event or len(x) < LEAST_ROWS:
        raise ValueError(
            f"fit({name}=...): must have shape {shape_of('rows', event)}, with at least "
            f"{LEAST_ROWS} rows; got {x.shape}."
        )
    context = check_context("fit", context, len(x))
    check_finite("fit", {name: x, "context": context})
    x = np.asarray(x)
    if density.support is not None:
        middle = x + (0.5 * (is_integer(x) & dequantize))[None].astype(x.dtype)
        check_inside("fit", jax.vmap(density.support.contains)(middle), middle)
    return x, context
