"""Train a density on data in one call: what is tried, and for how long."""

import contextlib
import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxode._checks.arguments import (
    check_bool,
    check_not_traced,
    check_number,
    integer,
)
from jaxode._checks.caller import arg, public
from jaxode._checks.rules import POSITIVE
from jaxode._checks.samples import check_key
from jaxode.density.density import Density, check_period
from jaxode.density.maps import FITS
from jaxode.density.maps.arguments import fitted
from jaxode.density.maps.chain import Chain
from jaxode.density.noise import Noise
from jaxode.flows.bases import fixed_columns
from jaxode.flows.coupling import Coupling, independent
from jaxode.training.display import finish
from jaxode.training.iterators import NoRowsLeftError, is_stream
from jaxode.training.loop import BLOCK, Clock, Limits, Phase, Point, Training, evaluation
from jaxode.training.processes import are_several, check_alike
from jaxode.training.rows import Table

TIME_POWERS = (2.0, 1.0)  # of `matching_loss`, to try,
MANY = 16  # the second one in more than so many dimensions
RATE, RATE_AFTER = 8e-3, 5e-4  # of Adam, in matching and in the likelihood after it
LONGEST = 1.0  # of a gradient of all parameters, to which Adam's are clipped
DECAY = 0.3  # of the weights in matching,
FEW_ROWS, FEW_FOR_A_COLUMN = 2000, 100  # up to so many rows, and so many for each column
WARM_UP = 100  # steps of matching
# Rounds in which each choice is tried. A round takes a part of the training, but at least so many
# steps, or four such parts. Skip trials that leave fewer than `LEAST_REMAINING` steps.
ROUNDS, TRIAL, SHORTEST, LEAST_REMAINING = 2, 0.025, 250, 1000
BEHIND, CLEARLY = 0.2, 0.2  # nats by which a map is out after a round, and uniform times are taken


@public("fit")
def fit(
    density: Density,
    x: Float[Array, "rows *event"] | Iterable[Any],
    *,
    key: PRNGKeyArray,
    context: PyTree = None,
    seconds: float | None = None,
    steps: int | None = None,
    validation: float | Any = 0.1,
    batch_size: int = 512,
    optimizer: Any = None,
    coupling: Coupling = independent(),
    likelihood: int = 0,
    time_power: float | None = None,
    dequantize: bool | Noise = False,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> tuple[Density, list[Point]]:
    """Train a density on data, and keep the parameters that are best on rows set aside.

    By flow matching. At steps that are 30% apart, a moving average of the parameters is evaluated
    on the validation rows. At least every 50 steps, the updates of the optimizer shrink, to zero by
    a cosine at the end: after `seconds` or `steps`, a minute by default. After five
    validations in a row that are worse than the best by 0.02 nats, not counting the first 1000
    steps, training resumes from the best parameters and takes as many more steps as led to them. If
    it explodes, it goes on from the best parameters at a quarter of the rate. Ctrl-C ends it with
    the best so far.

    A density without `standardize=` is whitened (with over 500 columns, or a singular covariance,
    each column is mapped to a normal). If trials leave 1000 steps to the training, it gets the map
    that is best after one: these two, or an affine map. In more than 16 dimensions, `time_power` is
    tried in the same way: it is 2 unless 1 is better by 0.2 nats. Each choice is tried for 5% of
    the training, but at least for 500 steps or a fifth of it, whichever is less. Maps that are 0.2
    nats behind after half of that are out. Angles and centred particles stay as they are.

    Args:
        density: made by `jaxode.bind`. Training starts from its parameters.
        x: data in their own units, `[rows, *event]`. A table of more than 100,000 rows is not
            copied, and may be a file, by `np.load(file, mmap_mode="r")`: maps are fitted to a
            sample, and 50 steps at a time read their rows. Or an iterable of arrays of rows, or of
            pairs `(x, context)`, such as a loader that shuffles: a thread reads ahead, maps are
            fitted to the first 20,000 rows, and it starts again at its end. An iterator cannot, and
            ends training; its last rows are left out, if they are fewer than those of 50 batches.
        key: draws everything: the rows set aside, batches, base samples and noise.
        context: one row for each of `x`. The density then knows the shape of a row.
        seconds: end after this time of training, late by a block of a second and a validation. It
            counts neither compilation, with the first validation, nor the fitting of maps.
        steps: end after this many steps. Without `seconds`, the result is a function of `key`.
        validation: the part of the rows to set aside, or other rows: `x`, or `(x, context)`. At
            most 1000 of them are used. An iterable needs other rows.
        batch_size: rows in a step, drawn with replacement; each once, if `x` is an iterable.
        optimizer: of Optax, for matching. Adam at 8e-3 by default, on gradients that are
            clipped to norm one. It decays matrices by 0.3 if there are at most 2000 rows, and at
            most 100 for each column.
        coupling: which base sample goes with which row, as for `matching_loss`.
        likelihood: steps of maximum likelihood after matching and its `seconds`, from the best
            parameters, with Adam at 5e-4, the first 50 at the full rate.
        time_power: as for `matching_loss`.
        dequantize: add noise in (0, 1) to columns of integers, new after 50 steps; not to
            validation rows of your own that have noise. True is "uniform"; "normal" and a tuple of
            levels are as in `jaxode.images.dequantize`. `log_prob` is then that of `x + noise`.
            Validations subtract the log-density of the noise, so that bounds are compared.
        mesh: devices to train on. Each takes an equal part of every batch, and they average their
            gradients once a step. The result is that of one device, up to rounding, but for a
            coupling that pairs rows: a device pairs its own. Processes count equally, whatever
            their rows: give each about as many.
        progress: show steps, the loss of validation rows and the time left on stderr: on one line
            of a terminal, and a line for each validation in a file or a notebook.

    Returns:
        The density with the best parameters, and its validations in training.
        These rows have chosen the parameters, so report the score of others. To go on, call it
        again with the density, the same rows as `validation` (another key sets others aside) and
        the same `time_power`, if you gave one; the state of the optimizer is not kept.

    Raises:
        TypeError, ValueError: for an invalid argument, and inside `jit`.
        FloatingPointError: if no validation is finite.

    Warns:
        UserWarning: of columns that have no density: they repeat values, or depend linearly on each
            other, or hold integers so large that `dequantize` adds no noise to them; of a training
            that explodes; and of one that took hardly a step in its seconds.
    """
    begin = time.perf_counter()
    if not isinstance(density, Density):
        raise TypeError(
            f"fit(density=...): must be made by jaxode.bind; got {type(density).__name__}. Pass "
            "jaxode.bind(flow, params)."
        )
    data = None if is_stream(x) else x
    check_not_traced("looks at data and at the clock", density, data, context, key)
    keys = iter(jax.random.split(check_key(key), 6))
    limits = Limits.of(steps, seconds)
    check_bool("progress", progress)
    batch_size = integer("batch_size", batch_size)
    likelihood = integer("likelihood", likelihood, 0, "a number of steps")
    if optimizer is not None and not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"fit(optimizer=...): must be an optimizer of Optax; got {optimizer!r}. Pass "
            "optax.adam(1e-3)."
        )
    mesh = check_mesh(mesh, batch_size)
    powers = TIME_POWERS if math.prod(density.event_shape) > MANY else TIME_POWERS[:1]
    if time_power is not None:
        check_number("time_power", time_power, POSITIVE)
        powers = (time_power,)
    density = _trainable(density)
    check_alike(
        f"events of shape {density.event_shape}, key {jax.random.key_data(key)}, {steps} steps, "
        f"{seconds} seconds, {likelihood} of likelihood, batches of {batch_size}",
        mesh,
    )
    table = Table.of(density, x, context, validation, dequantize, next(keys), mesh)
    plan = Plan(limits, batch_size, optimizer, coupling, powers, likelihood, progress, mesh)
    return train(density, table, plan, tuple(keys), begin)


class Plan(NamedTuple):
    """Options of a training."""

    limits: Limits
    batch_size: int = 512
    optimizer: Any = None
    coupling: Coupling = independent()
    powers: tuple[float, ...] = TIME_POWERS[:1]
    likelihood: int = 0
    progress: bool = True
    mesh: Mesh | None = None


def train(
    density: Density, table: Table, plan: Plan, keys: tuple[PRNGKeyArray, ...], begin: float
) -> tuple[Density, list[Point]]:
    """Train a density on the rows of a table, with five keys. See `fit`."""
    limits, batch_size, optimizer = plan.limits, plan.batch_size, plan.optimizer
    aside_key, noise_key, matching_key, validation_key, likelihood_key = keys
    validation_rows = table.noisy(table.validation, aside_key)
    if table.rows.context is not None:
        shapes = tuple(leaf.shape[1:] for leaf in jax.tree.leaves(table.rows.context))
        density = dataclasses.replace(density, contexts=density.contexts.knowing(shapes))
        first = jax.tree.map(lambda leaf: jnp.asarray(leaf[np.array([0])][0]), table.rows.context)
        check_period("fit", "density", density.flow, density.params, first)
    flow = dataclasses.replace(density.flow, throw=False)
    # The power of the time is an input of the program, which is then the same for all.
    losses = [Partial(_matching, flow, plan.coupling, jnp.asarray(power)) for power in plan.powers]
    as_vector = False
    if optimizer is None:
        few = min(FEW_ROWS, FEW_FOR_A_COLUMN * math.prod(density.event_shape))
        as_vector = table.count > few
        optimizer = adam(RATE, 0.0 if as_vector else DECAY)  # which only matrices have
    phases = [
        Phase("matching", loss, optimizer, matching_key, WARM_UP, as_vector) for loss in losses
    ]

    clock = Clock(plan.mesh)

    def start(density):
        data, in_flow, log_det = table.in_flow(
            density, validation_rows, noise_key, BLOCK * batch_size
        )
        evaluate = evaluation(density, in_flow, log_det, validation_key, plan.mesh)
        count = table.count
        return Training(
            density, data, evaluate, count, batch_size, begin, clock, plan.progress, plan.mesh,
            in_order=table.stream is not None,
        )  # fmt: skip

    fits = _fits(density)
    maps = _mapped(density, fits, table.noisy(table.some(), noise_key).x)
    runs = [start(next(maps))]
    try:
        others = max(len(fits) - 1, 0), len(phases) - 1
        if limits.seconds < math.inf and any(others):
            # To know how long steps and validations take.
            _advance(runs[0], phases[0], limits, BLOCK)
        if steps := _round(runs[0], others[0], limits):
            _try_maps(runs, map(start, maps), phases[0], limits, steps)
        if steps := _round(runs[0], others[1], limits):
            runs.append(start(runs[0].density))
            _try_powers(runs, phases, limits, steps)
        (run,) = runs
        run.train(run.phase or phases[0], limits)
        run.validate_again()
        if plan.likelihood:
            after = Phase(
                "likelihood", Partial(_likelihood, flow), adam(RATE_AFTER), likelihood_key,
                as_vector=True,
            )  # fmt: skip
            run.train(after, Limits(plan.likelihood))
            run.validate_again()
    except (KeyboardInterrupt, NoRowsLeftError) as end:
        # Other processes may be at another step when this one is interrupted.
        alone = isinstance(end, NoRowsLeftError) or not are_several(plan.mesh)
        for run in runs if alone else ():
            run.validate_again()
        if isinstance(end, NoRowsLeftError) and not any(p.step for run in runs for p in run.points):
            raise ValueError(
                f"fit(x=...): the iterator must give the rows of {BLOCK} batches of {batch_size}, "
                "which training reads at a time; it ended before. Pass its rows as an array, or "
                "an iterable that starts again, such as a list or a loader."
            ) from None
        if _best(runs).best_nll == math.inf:
            raise
        if isinstance(end, NoRowsLeftError):
            warnings.warn(
                f"fit(x=...): training ended with the iterator, after {end.count} rows. Pass an "
                "iterable that starts again, such as a list or a loader, or itertools.cycle of it.",
                stacklevel=4,
            )
    finally:
        if table.stream is not None:
            table.stream.close()
    if plan.progress:
        finish()
    return _result(_best(runs), limits)


def _try_maps(
    runs: list[Training], rest: Iterable[Training], phase: Phase, limits: Limits, steps: int
) -> None:
    """Leave the best of some maps after rounds of so many steps."""
    runs += rest
    for i in range(1, ROUNDS + 1):
        for run in runs:
            _advance(run, phase, limits, i * steps)
        enough = _best(runs).best_nll + BEHIND
        runs[:] = [run for run in runs if run.best_nll <= enough]
        if len(runs) == 1:
            return
    runs[:] = [_best(runs)]


def _try_powers(runs: list[Training], phases: list[Phase], limits: Limits, steps: int) -> None:
    """Leave the first run, unless the other phase is clearly better."""
    for run, phase in zip(runs, phases, strict=True):
        _advance(run, phase, limits, ROUNDS * steps)
    # Early on uniform times often look a little better, and are worse later.
    del runs[0 if runs[1].best_nll < runs[0].best_nll - CLEARLY else 1]


def _round(run: Training, others: int, limits: Limits) -> int:
    """Steps of a round of a trial, or zero if it leaves too few to the training itself."""
    in_time = run.clock.steps_remaining(limits)
    total = min(limits.steps, in_time)
    steps = int(max(TRIAL * total, min(SHORTEST, 4 * TRIAL * total)))
    validations = ROUNDS * (others + 1) * run.validation_seconds / run.clock.step
    left = min(limits.steps, in_time - ROUNDS * steps * others - validations)
    return steps if others and left >= LEAST_REMAINING else 0


def _advance(run: Training, phase: Phase, limits: Limits, until: int) -> None:
    """Train up to a step, and validate."""
    reached = run.step if run.phase else 0
    run.train(phase, limits, until - reached)
    run.validate_again()


def _best(runs: list[Training]) -> Training:
    return min(runs, key=lambda run: run.best_nll)


def _result(run: Training, limits: Limits) -> tuple[Density, list[Point]]:
    """The best density and its validations, with warnings if training exploded or hardly began."""
    if run.best_nll == math.inf:
        raise FloatingPointError(
            "fit: the log-density of the validation rows is never finite. One row is enough "
            "for that. Check the data for outliers, or tighten rtol and atol of the flow."
        )
    if run.explosions:
        first, *others = run.explosions
        often = f"{len(run.explosions)} times, first" if others else "once,"
        warnings.warn(
            f"fit: training exploded {often} at step {first.step} of {first.phase}, to "
            f"{first.nats:.3g} nats of the validation rows. It went on from the best parameters "
            "at a quarter of the rate. Lower the rate of the optimizer.",
            stacklevel=5,
        )
    taken = max(point.step for point in run.points if point.phase == "matching")
    if taken < min(WARM_UP, limits.steps) and run.clock.spent >= limits.seconds:
        warnings.warn(
            f"fit(seconds=...): the density is hardly trained: {taken} steps of matching in this "
            "time. Pass more seconds, or steps=.",
            stacklevel=5,
        )
    best = run.best
    if run.mesh is not None:  # each device has them; any program can use those of none
        on_host = lambda leaf: jnp.asarray(np.asarray(leaf)) if eqx.is_array(leaf) else leaf
        best = best.with_params(jax.tree.map(on_host, best.params))
    return best, run.points


def _matching(flow, coupling, time_power, params, x, context, key):
    options = {"context": context, "coupling": coupling, "time_power": time_power}
    return flow.matching_loss(params, x, key=key, **options)


def _likelihood(flow, params, x, context, key):
    return flow.nll(params, x, key=key, context=context)


@functools.cache
def adam(rate: float, decay: float = 0.0) -> Any:
    """Adam, clipped; for the same numbers the same object, which is not compiled again."""
    import optax

    # Unlike that of `optax.adamw`, the decay leaves constants alone, which have no gradient.
    def decayed(update, leaf):
        return update + decay * leaf * (update != 0) if decay and leaf.ndim > 1 else update

    return optax.chain(
        optax.clip_by_global_norm(LONGEST),
        optax.scale_by_adam(),
        optax.stateless(lambda updates, params: jax.tree.map(decayed, updates, params)),
        optax.scale_by_learning_rate(rate),
    )


def check_mesh(mesh: Any, batch_size: int) -> Mesh | None:
    """A mesh whose devices the batch can be split over."""
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"{arg('mesh')} must be a mesh of JAX, or None; got {type(mesh).__name__}. Pass "
            'jax.sharding.Mesh(jax.devices(), "batch").'
        )
    if batch_size % mesh.size:
        raise ValueError(
            f"{arg('mesh')} must have a number of devices that divides the {batch_size} rows of a "
            f"batch; got {mesh.size}."
        )
    return Mesh(mesh.devices, mesh.axis_names)  # without types of its axes


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


def _fits(density: Density) -> list[Callable[..., Any]]:
    """Functions that fit each candidate map."""
    columns = math.prod(density.event_shape) - len(fixed_columns(density.flow.base))
    if density.standardize is not None or not columns:
        return []
    return [fit for fit, most in FITS if columns <= most]


def _mapped(
    density: Density, fits: list[Callable[..., Any]], x: Float[Array, "rows *event"]
) -> Iterator[Density]:
    """The density with each map that can be fitted to the data."""
    if not fits:
        yield density
    for fit in fits:
        with contextlib.suppress(*[ValueError] if fit is not fits[-1] else []):
            units = fitted("x", x, fit, density.support, fixed_columns(density.flow.base))
            yield dataclasses.replace(density, maps=Chain((*density.maps.maps, units)))
