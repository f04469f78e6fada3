"""Train a density on data in one call."""

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxode._checks.arguments import (
    check_not_traced,
    check_number,
    integer,
)
from jaxode._checks.caller import public
from jaxode._checks.rules import POSITIVE
from jaxode._checks.samples import check_key
from jaxode.coupling import Coupling, independent
from jaxode.density.density import Density, check_period
from jaxode.density.maps import FITS
from jaxode.density.maps.bind_arguments import fitted
from jaxode.density.maps.chain import Chain
from jaxode.density.noise import Noise
from jaxode.flows.bases import fixed_columns
from jaxode.flows.cnf import CNF
from jaxode.flows.embedding import Embedded, embedded
from jaxode.nn import Ensemble
from jaxode.training.budget import Budget
from jaxode.training.dataset import DataArguments, Dataset, datasets_of_members
from jaxode.training.devices import Devices
from jaxode.training.iterators import NoRowsLeftError, is_stream
from jaxode.training.loop import Plan, Training
from jaxode.training.steps import STEPS_PER_BLOCK, Phase
from jaxode.training.trials import Candidates, powers_to_try
from jaxode.training.turns import keeping_the_best, points_of_all, take_turns, with_finite_best
from jaxode.training.validations import Point, evaluation

MATCHING_RATE = 8e-3  # of Adam
LIKELIHOOD_RATE = 5e-4  # of Adam
MAX_GRADIENT_NORM = 1.0  # of all parameters, to which gradients are clipped
# Matching decays the weights of matrices if there are few rows: at most so many, and so many for
# each column.
MATCHING_WEIGHT_DECAY = 0.3
MOST_ROWS_WITH_DECAY = 2000
MOST_ROWS_PER_COLUMN_WITH_DECAY = 100
MATCHING_WARM_UP_STEPS = 100


@public("fit")
def fit(
    density: Density,
    x: Float[Array, "rows *event"] | Iterable[Any],
    *,
    key: PRNGKeyArray,
    context: PyTree = None,
    weights: Float[Array, " rows"] | None = None,
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

    The networks of a `jaxode.nn.Ensemble` are trained apart, 50 steps each in turn, on batches of
    their own. The first one chooses maps for all. Each keeps its own best parameters.

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
        weights: of the rows, at least 0; only their ratios count. Steps draw rows in proportion to
            them, and validations take weighted means; validation rows of your own count equally. A
            row of weight 0 is left out, whatever it holds.
        seconds: wall-clock time of training, one minute by default. It counts steps and
            validations; it does not count compilation, the first validation, or the fitting
            of maps. Training ends late by up to a block of a second and a validation.
        steps: end after this many steps, of each network. Without `seconds`, the result is a
            function of `key`.
        validation: the part of the rows to set aside, another one for each network of an ensemble;
            or other rows: `x`, or `(x, context)`. At most 1000 of them are used. An iterable needs
            other rows.
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
        The density with the best parameters, and its validations in training; of an ensemble, the
        mean of the last one of each network.
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
    budget = Budget.from_arguments(steps, seconds, progress)
    if not isinstance(density, Density):
        raise TypeError(
            f"fit(density=...): must be made by jaxode.bind; got {type(density).__name__}. Pass "
            "jaxode.bind(flow, params)."
        )
    data = None if is_stream(x) else x
    check_not_traced("looks at data and at the clock", density, data, context, key)
    aside_key, *keys = jax.random.split(check_key(key), 6)
    batch_size = integer("batch_size", batch_size)
    likelihood = integer("likelihood", likelihood, 0, "a number of steps")
    _check_optimizer(optimizer)
    devices = Devices.from_mesh(mesh, batch_size)
    powers = powers_to_try(math.prod(density.event_shape))
    if time_power is not None:
        check_number("time_power", time_power, POSITIVE)
        powers = (time_power,)
    budget = dataclasses.replace(budget, progress=budget.progress and devices.first_process)
    plan = Plan(budget, batch_size, optimizer, coupling, powers, likelihood, devices)
    density = _trainable(density)
    devices.check_alike(
        f"events of shape {density.event_shape}, key {jax.random.key_data(key)}, {steps} steps, "
        f"{seconds} seconds, {likelihood} of likelihood, batches of {batch_size}"
    )
    members = len(members_of(density.params))
    arguments = DataArguments(x, context, weights, validation, dequantize)
    datasets = datasets_of_members(density, arguments, aside_key, devices=devices, members=members)
    return train(density, datasets, plan, Keys(*keys))


class Keys(NamedTuple):
    """The keys of a training, by what they draw."""

    validation_noise: PRNGKeyArray
    noise: PRNGKeyArray
    """Noise of the rows that a map is fitted to."""
    matching: PRNGKeyArray
    validation: PRNGKeyArray
    """Probes of the divergence."""
    likelihood: PRNGKeyArray


def members_of(params: PyTree) -> tuple[Any, ...]:
    """The networks of an ensemble, each of which is trained apart, or the parameters alone."""
    return params.members if isinstance(params, Ensemble) else (params,)


def train(
    density: Density, datasets: Sequence[Dataset], plan: Plan, keys: Keys
) -> tuple[Density, list[Point]]:
    """Choose a map and a power of the time by trials, then train on, and refine by likelihood.

    The first member of an ensemble chooses for all. They then take turns, 50 steps each, so that
    all of them end with the seconds.

    Args:
        density: with parameters to start from.
        datasets: of each of its `members_of`.
        plan: the options.
        keys: the keys.

    Returns:
        The best density and its validations.
    """
    first, *other_networks = members_of(density.params)
    density = _knowing_contexts(density, datasets[0].validation.context)
    flow = dataclasses.replace(density.flow, throw=False)
    phases = _matching_phases(flow, datasets[0].source.count, plan, keys.matching)
    fits = _fits(density)
    maps = _mapped(density.with_params(first), fits, datasets[0], keys.noise)

    def start(density: Density, number: int = 0) -> Training:
        """A training of a member in the density with its map."""
        dataset, most = datasets[number], STEPS_PER_BLOCK * plan.batch_size
        validation = dataset.noise.add(dataset.validation, keys.validation_noise)
        take, in_flow, log_det = dataset.in_flow(density, validation, keys.noise, most)
        evaluate = evaluation(
            density, in_flow, log_det, keys.validation, plan.devices, dataset.weights
        )
        label = f" of network {number + 1}" if other_networks else ""
        return Training(density, dataset.source, take, evaluate, plan, label)

    with contextlib.ExitStack() as stack:
        for dataset in datasets:
            stack.callback(dataset.source.close)
        candidates = Candidates([start(next(maps))], start, phases, plan.budget)
        runs: list[Training] = []
        with (
            keeping_the_best(candidates.runs, plan.budget),
            _until_no_rows_are_left(candidates, plan),
        ):
            chosen = candidates.choose(maps, max(len(fits) - 1, 0))
            runs = candidates.runs
            for number, network in enumerate(other_networks, 1):
                runs.append(start(chosen.model.with_params(network), number))
            take_turns(runs, chosen.phase or phases[0], plan.budget)
            if plan.likelihood:
                refine = _likelihood_phase(flow, keys.likelihood)
                take_turns(runs, refine, plan.budget.of_steps(plan.likelihood))
    return _result(runs or [candidates.best], plan, isinstance(density.params, Ensemble))


@contextlib.contextmanager
def _until_no_rows_are_left(candidates: Candidates, plan: Plan) -> Iterator[None]:
    """End training with the rows of an iterator, unless no validation is finite."""
    try:
        yield
    except NoRowsLeftError as end:
        candidates.validate()
        if not any(point.step for run in candidates.runs for point in run.points):
            raise ValueError(
                f"fit(x=...): the iterator must give the rows of {STEPS_PER_BLOCK} batches of "
                f"{plan.batch_size}, which training reads at a time; it ended before. Pass its "
                "rows as an array, or an iterable that starts again, such as a list or a loader."
            ) from None
        if candidates.best.best_nll == math.inf:
            raise
        warnings.warn(
            f"fit(x=...): training ended with the iterator, after {end.count} rows. Pass an "
            "iterable that starts again, such as a list or a loader, or itertools.cycle of it.",
            stacklevel=6,
        )


def _result(runs: list[Training], plan: Plan, ensemble: bool) -> tuple[Density, list[Point]]:
    """The best density and its validations, with warnings if training exploded or hardly began."""
    runs = with_finite_best(
        runs,
        "fit: the log-density of the validation rows is never finite. One row is enough for "
        "that. Check the data for outliers, or tighten rtol and atol of the flow.",
    )
    if explosions := [point for run in runs for point in run.validations.explosions]:
        first, *further = explosions
        often = f"{len(explosions)} times, first" if further else "once,"
        warnings.warn(
            f"fit: training exploded {often} at step {first.step} of {first.phase}, to "
            f"{first.nats:.3g} nats of the validation rows. It went on from the best parameters "
            "at a quarter of the rate. Lower the rate of the optimizer.",
            stacklevel=5,
        )
    taken = min(map(_steps_of_matching, runs))
    hardly = taken < min(MATCHING_WARM_UP_STEPS, plan.budget.steps) and plan.budget.over
    # Who presses Ctrl-C knows how far training was, if it had begun.
    if hardly and not (plan.budget.interrupted and taken):
        in_time = (
            "before Ctrl-C."
            if plan.budget.interrupted
            else "in this time. Pass more seconds, or steps=."
        )
        warnings.warn(
            f"fit(seconds=...): the density is hardly trained: {taken} steps of matching {in_time}",
            stacklevel=5,
        )
    best = [plan.devices.from_all(run.best.params) for run in runs]
    params = Ensemble.of(best) if ensemble else best[0]
    return runs[0].best.with_params(params), points_of_all(runs)


def _steps_of_matching(run: Training) -> int:
    return max(point.step for point in run.points if point.phase == "matching")


def _matching_phases(flow: CNF, rows: int, plan: Plan, key: PRNGKeyArray) -> list[Phase]:
    """Matching at each power of the time."""
    optimizer, as_vector = plan.optimizer, False
    if optimizer is None:
        columns = math.prod(flow.base.event_shape)
        few = min(MOST_ROWS_WITH_DECAY, MOST_ROWS_PER_COLUMN_WITH_DECAY * columns)
        as_vector = rows > few  # only the decay needs to tell matrices from other parameters
        optimizer = adam(MATCHING_RATE, 0.0 if as_vector else MATCHING_WEIGHT_DECAY)
    # The power of the time is an input of the program, which is then the same for all.
    losses = [Partial(_matching, flow, plan.coupling, jnp.asarray(power)) for power in plan.powers]
    return [
        Phase("matching", loss, optimizer, key, MATCHING_WARM_UP_STEPS, as_vector)
        for loss in losses
    ]


def _likelihood_phase(flow: CNF, key: PRNGKeyArray) -> Phase:
    loss = Partial(_likelihood, flow)
    return Phase("likelihood", loss, adam(LIKELIHOOD_RATE), key, as_vector=True)


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
        optax.clip_by_global_norm(MAX_GRADIENT_NORM),
        optax.scale_by_adam(),
        optax.stateless(lambda updates, params: jax.tree.map(decayed, updates, params)),
        optax.scale_by_learning_rate(rate),
    )


def _check_optimizer(optimizer: Any) -> None:
    if optimizer is not None and not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"fit(optimizer=...): must be an optimizer of Optax; got {optimizer!r}. Pass "
            "optax.adam(1e-3)."
        )


def _knowing_contexts(density: Density, context: PyTree) -> Density:
    """The density with the shapes of contexts. Check periods of the field at the first context."""
    if context is None:
        return density
    shapes = tuple(leaf.shape[1:] for leaf in jax.tree.leaves(context))
    density = dataclasses.replace(density, contexts=density.contexts.knowing(shapes))
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), context)
    params, rows = embedded(density.params, first)
    row = jax.tree.map(lambda leaf: leaf[0], rows)
    check_period("fit", "density", density.flow, params, row)
    return density


def _trainable(density: Density) -> Density:
    """The density with Python's numbers among its parameters as arrays."""

    # A strong dtype: the first step would change that of a weakly typed array, and so compile the
    # program again.
    def as_array(leaf):
        return jnp.asarray(leaf, float) if isinstance(leaf, float) else leaf

    params = jax.tree.map(as_array, density.params)
    if isinstance(params, Embedded) and isinstance(params.params, Ensemble):
        raise ValueError(
            "fit(density=...): must have one network beside embed=, which those of an Ensemble "
            "would share; got an Ensemble. Pass one of its members."
        )
    if not any(map(eqx.is_inexact_array, jax.tree.leaves(params))):
        raise TypeError(
            "fit(density=...): its parameters must hold floating arrays, to train them; got none. "
            "Pass the network itself as params of bind."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if eqx.is_inexact_array(leaf) and not np.isfinite(leaf).all():
            raise ValueError(
                "fit(density=...): its parameters must be finite; got NaN or inf in "
                f"params{jax.tree_util.keystr(path)}. Start from the parameters before those, or "
                "from new ones."
            )
    return density.with_params(params)


def _fits(density: Density) -> list[Callable[..., Any]]:
    """Functions that fit each candidate map."""
    columns = math.prod(density.event_shape) - len(fixed_columns(density.flow.base))
    if density.standardize is not None or not columns:
        return []
    return [fit for fit, most in FITS if columns <= most]


def _mapped(
    density: Density, fits: list[Callable[..., Any]], dataset: Dataset, key: PRNGKeyArray
) -> Iterator[Density]:
    """The density with each map that can be fitted to the data."""
    if not fits:
        yield density
        return
    x = dataset.sample(key).x
    for fit in fits:
        with contextlib.suppress(*[ValueError] if fit is not fits[-1] else []):
            units = fitted("x", x, fit, density.support, fixed_columns(density.flow.base))
            yield dataclasses.replace(density, maps=Chain((*density.maps.maps, units)))
