"""Train the density of a table."""

import dataclasses
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from jaxode._checks.arguments import check_bool, integer, is_number
from jaxode._checks.caller import arg, public
from jaxode._checks.samples import check_key, check_weights
from jaxode._jax.precision import single_precision
from jaxode.density.density import Density, bind
from jaxode.density.maps.whiten import dependent_columns, principal_axes
from jaxode.flows.bases import standard_normal, torus
from jaxode.flows.construct import cnf
from jaxode.nn import Ensemble, Residual, field
from jaxode.tabular import frames
from jaxode.tabular.columns.kinds import encoder_of
from jaxode.tabular.columns.periodic import TURN
from jaxode.tabular.encoding import CellNoise, Encoded, Encoder, out_of_domain, with_noise
from jaxode.tabular.fit_categories import ModesSplit, trained_categories
from jaxode.tabular.predictions.level_calibration import calibrated
from jaxode.tabular.table import Table
from jaxode.training.budget import Budget
from jaxode.training.dataset import MAX_VALIDATION_ROWS, MIN_ROWS, Dataset, split_rows
from jaxode.training.devices import Devices
from jaxode.training.fit import MATCHING_RATE, Keys, adam, members_of, train
from jaxode.training.loop import Plan
from jaxode.training.sources import InMemory, Rows
from jaxode.training.trials import powers_to_try
from jaxode.training.validations import Point

MEMBERS = 5  # networks of an ensemble by default
MAX_ENSEMBLE_ROWS = 5000  # rows beyond which one network is the default
MEMBER_WIDTH = 64  # units of a layer
MEMBER_BATCH = 256  # rows of a step
TABLE_DECAY = (
    1.0  # of weights, times the rate, for one network, which could learn the rows by heart
)
MEMBER_DECAY = 0.3  # likewise for a member of an ensemble, whose mean does not learn them
CATEGORY_PART_OF_SECONDS = 0.25  # of a training, if there are numbers too
FULL_DECAY_ROWS = 3000  # in larger tables, the decay is in inverse proportion to the rows
# Levels of one number must not decrease. Now and then the estimated error of a long step is near
# zero by chance, and the step moves a level by 0.008: so steps are short. Several numbers have more
# noise than that.
SOLVE_OF_ONE_NUMBER: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5, "max_step": 1 / 8}
SOLVE_OF_SEVERAL: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}


@public("tabular.fit", single_precision)
def fit(
    frame: Any,
    *,
    key: PRNGKeyArray,
    given: Any = (),
    kinds: dict[str, str | tuple[str, float] | tuple[str, str]] | None = None,
    bounds: dict[str, tuple[float | None, float | None]] | None = None,
    other: int | None = None,
    seconds: float | None = None,
    steps: int | None = None,
    validation: float | Any = 0.1,
    members: int | None = None,
    calibrate: bool | None = None,
    weights: Any = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> tuple[Table, list[Point]]:
    """Train the density of a table with categories, integers and missing values.

    A row's log-probability is that of its categories, of what is missing and of numbers that are
    repeated, by an autoregressive network; plus the log-density of its other numbers given those,
    by `jaxode.fit`. Numbers that are rounded get noise of the rounding, whose density counts.

    Args:
        frame: rows, of pandas, polars or pyarrow.
        key: draws everything: the rows set aside, batches and noise.
        given: names of columns that are not modelled: the density is conditional on them.
        kinds: "categorical", "integer" or "continuous", for columns whose type does not say it. By
            default strings, categories and booleans are categorical, whole numbers are integers.
            Or ("periodic", period) for angles, hours and the like, whose end is their start;
            "periodic" alone takes the first of 1, 2 pi, 7, 12, 24, 60 and 360 that holds them.
            Dates and times are "date": integers of the coarsest unit that holds them all, from
            years to microseconds, in wall-clock time. So are texts that you call "date", or
            ("date", format) with a format of `datetime.strptime`. Given ones also enter as angles
            of the year, the week and the day.
        bounds: `(low, high)` of columns that have any, such as `{"income": (0, None)}`; of dates,
            dates or ISO texts. Samples respect them.
        other: categories with fewer rows are pooled, and unseen ones of given columns count as one
            of those. By default all of given columns and the 500 most frequent ones of others are
            kept, and unseen ones raise where none are pooled.
        seconds: wall-clock time of training, one minute by default. It counts steps and
            validations; it does not count compilation, the first validation, or reading and
            calibration. A quarter goes to the categories, or less if they end earlier; the numbers
            get the rest.
        steps: end both trainings after this many steps. Without `seconds`, the result is a function
            of `key`.
        validation: the part of the rows to set aside, another one for each network, or a frame of
            others. At most 1000 are used, and none of a frame whose density is zero, with a
            warning.
        members: networks, each with an equal part of the seconds: of the numbers, whose fields are
            averaged (`jaxode.nn.Ensemble`), and of the categories, whose probabilities are. Five
            by default up to 5000 rows, and one beyond.
        calibrate: whether to change the levels of a number, given other columns, so that they hold
            on the rows aside, each judged by a network that did not train on it. The mean of
            several networks is often sharper than they are, and its intervals then cover too much.
            No by default: networks that are best on rows aside have about right levels there.
        weights: of the rows, at least 0, as for `jaxode.fit`. `other` counts rows, whatever their
            weights.
        mesh: devices of one process to train the numbers on, as for `jaxode.fit`; the categories
            take one of them.
        progress: show steps, the loss of validation rows and the time left on stderr.

    Returns:
        The table, and the validations in training: phases "categories" and "matching".

    Raises:
        TypeError, ValueError: for a frame that is no table, an unknown column, or a wrong option.

    Warns:
        UserWarning: of numbers that depend on each other linearly: they have no density; and of
            more than 500 categories in a modelled column, or more than a tenth of the rows; and of
            rows of a frame `validation` that are left out.
    """
    budget = Budget.from_arguments(steps, seconds, progress)
    keys = jax.random.split(check_key(key), 4)
    plan = Plan(budget, devices=Devices.from_mesh(mesh, Plan(budget).batch_size))
    if plan.devices.several_processes:
        raise ValueError(
            f"{arg('mesh')} must have devices of one process, since each would read its own "
            "columns; got several. Train in one process."
        )
    other = None if other is None else integer("other", other, 2)
    frame, weights = _checked_frame(frame, weights)
    encoder = encoder_of(frame, given, kinds or {}, bounds or {}, other, weights)
    calibrate = _calibrates(encoder, calibrate)
    members = _members(members, len(frame))
    splits = _split(encoder, frame, validation, keys[0], members, weights)
    _warn_of_dependence(encoder, splits[0].rows)

    network, density, moments, points = None, None, None, []
    if encoder.discrete:
        part = CATEGORY_PART_OF_SECONDS if encoder.numbers else 1.0
        of_categories = dataclasses.replace(budget, seconds=part * budget.seconds)
        modes = [_modes(encoder, split) for split in splits]
        network, points = trained_categories(keys[1], encoder.sizes, modes, of_categories)
    if encoder.numbers:
        density, validations = _train_numbers(encoder, splits, plan, keys[2])
        if calibrate:
            density = calibrated(density, *_levels_aside(encoder, density, splits, keys[3]))
        moments, points = _moments(encoder, splits[0], keys[3]), points + validations
    return Table(encoder, network, density, moments), points


def _checked_frame(frame: Any, weights: Any) -> tuple[Any, np.ndarray | None]:
    """The rows with a weight above zero, and their weights, if there are any."""
    frame = frames.as_frame("frame", frame)
    if weights is not None:
        weights = np.asarray(check_weights(weights, jnp.zeros(len(frame))))
        frame, weights = frame.filter((weights > 0).tolist()), weights[weights > 0]
    if not frame.columns:
        raise ValueError(f"{arg('frame')} must have at least one column; got none.")
    if len(frame) < MIN_ROWS:
        raise ValueError(f"{arg('frame')} must have at least {MIN_ROWS} rows; got {len(frame)}.")
    return frame, weights


def _members(members: int | None, rows: int) -> int:
    """The number of networks."""
    if members is not None:
        return integer("members", members)
    return MEMBERS if rows <= MAX_ENSEMBLE_ROWS else 1


class EncodedSplit(NamedTuple):
    """The rows to train a network on, and its validation rows."""

    rows: Encoded
    aside: Encoded
    weights: np.ndarray | None = None
    aside_weights: np.ndarray | None = None


def _split(
    encoder: Encoder, frame: Any, validation: Any, key: PRNGKeyArray, members: int, weights: Any
) -> list[EncodedSplit]:
    """Set other rows aside for each member, or take those of a frame `validation` for all."""
    rows = encoder.encode(frame)
    draw = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def take(rows, chosen):
        return jax.tree.map(lambda leaf: leaf[chosen], rows)

    if not is_number(validation):
        aside = encoder.encode(frames.as_frame("validation", validation), "validation")
        possible = encoder.possible(aside)
        usable = np.flatnonzero(possible)
        if not len(usable):
            raise ValueError(
                f"{arg('validation')} must have at least one row whose values were in training; "
                "got none."
            )
        if len(usable) < len(possible):
            warnings.warn(
                f"{arg('validation')} must have values that were in training; got others in "
                f"{len(possible) - len(usable)} of {len(possible)} rows, such as row "
                f"{np.argmin(possible)}. Their density is zero, and the score leaves them out.",
                stacklevel=4,
            )
        aside = take(aside, draw.permutation(usable)[:MAX_VALIDATION_ROWS])
        return [EncodedSplit(rows, aside, weights)] * members

    def weights_of(chosen):
        return None if weights is None else weights[chosen]

    return [
        EncodedSplit(take(rows, train), take(rows, aside), weights_of(train), weights_of(aside))
        for train, aside in split_rows(validation, draw.permutation(len(frame)), members)
    ]


def _modes(encoder: Encoder, split: EncodedSplit) -> ModesSplit:
    """The modes of a split, with the features of the given columns."""

    def rows(encoded):
        return Rows(encoded.modes[:, encoder.discrete], encoded.features)

    return ModesSplit(rows(split.rows), rows(split.aside), split.weights, split.aside_weights)


def _train_numbers(
    encoder: Encoder,
    splits: list[EncodedSplit],
    plan: Plan,
    key: PRNGKeyArray,
) -> tuple[Density, list[Point]]:
    """Train the density of the numbers, with the modes of their rows as context."""
    cells = encoder.as_cells(splits[0].rows)
    noise = CellNoise.from_cells(encoder.domain, cells)

    def dataset(split: EncodedSplit) -> Dataset:
        source = InMemory(encoder.as_cells(split.rows), weights=split.weights)
        return Dataset(source, encoder.as_cells(split.aside), noise, split.aside_weights)

    datasets = list(map(dataset, splits))
    size, context = len(encoder.numbers), cells.context
    context_size = 0 if context is None else context.shape[1]
    network_key, train_key = jax.random.split(key)
    angle, period, base = encoder.domain.angle, None, standard_normal(size)
    if angle.any():
        period = np.where(angle, TURN, np.inf)
        base = torus(size, period)

    options = {"context_size": context_size, "period": period}
    size_factor, decay = min(1.0, FULL_DECAY_ROWS / len(splits[0].rows.modes)), TABLE_DECAY
    if len(splits) == 1:
        params = Residual(size, key=network_key, **options)
    else:

        def make(key):
            return Residual(size, MEMBER_WIDTH, key=key, **options)

        params = Ensemble(make, len(splits), key=network_key)
        plan, decay = plan._replace(batch_size=MEMBER_BATCH), MEMBER_DECAY
    flow = cnf(field, base, **(SOLVE_OF_ONE_NUMBER if size == 1 else SOLVE_OF_SEVERAL))
    support = None if encoder.box is None else (encoder.box.low, encoder.box.high)
    density = bind(flow, params, support=support)
    optimizer = adam(MATCHING_RATE, decay * size_factor)
    plan = plan._replace(optimizer=optimizer, powers=powers_to_try(size))
    keys = Keys(*jax.random.split(train_key, 5))
    return train(density, datasets, plan, keys)


def _calibrates(encoder: Encoder, calibrate: bool | None) -> bool:
    """Whether to calibrate levels. Raises if they cannot be."""
    if calibrate is not None:
        check_bool("calibrate", calibrate)
    if calibrate and (len(encoder.numbers) != 1 or len(encoder.columns) != 1):
        raise ValueError(
            f"{arg('calibrate')} needs one modelled column, of more than a few numbers; got "
            f"{[column.name for column in encoder.columns]}. Train with given= all others."
        )
    if calibrate and encoder.domain.angle.any():
        raise ValueError(
            f"{arg('calibrate')} needs a number with an order; {encoder.columns[0].name!r} is "
            "periodic. Leave it out."
        )
    return bool(calibrate)


def _levels_aside(
    encoder: Encoder, density: Density, splits: list[EncodedSplit], key: PRNGKeyArray
) -> tuple[np.ndarray, np.ndarray | None]:
    """The levels of validation rows, each in the density of a network that did not train on it; and
    their weights, if there are any."""
    all_levels, weights = [], []
    for split, network in zip(splits, members_of(density.params), strict=False):
        cells = encoder.as_cells(split.aside)
        x, _ = with_noise(encoder.domain, cells, key)
        levels = density.with_params(network).cdf(x, context=cells.context)
        is_number = ~cells.fill[:, 0]
        all_levels.append(np.asarray(levels)[is_number])
        weights.append(None if split.aside_weights is None else split.aside_weights[is_number])
    return np.concatenate(all_levels), None if weights[0] is None else np.concatenate(weights)


def _moments(encoder: Encoder, split: EncodedSplit, key: PRNGKeyArray):
    """Mean and covariance of the numbers, mapped out of their domain, to propose missing ones."""
    x, _ = with_noise(encoder.domain, encoder.as_cells(split.rows), key)
    v = np.asarray(out_of_domain(encoder.domain, x), float)
    covariance = np.atleast_2d(np.cov(v.T, aweights=split.weights))
    return np.average(v, axis=0, weights=split.weights), covariance


def _warn_of_dependence(encoder: Encoder, rows: Encoded) -> None:
    """Warn if a modelled number is a linear function of others: then there is no density."""
    modelled = [encoder.columns[i] for i in encoder.numbers]
    smooth = [j for j, c in enumerate(modelled) if not (c.grids[-1] or rows.fill[:, j].any())]
    start = np.cumsum([0, *(column.width for column in encoder.given)])
    simple = [i for i, c in enumerate(encoder.given) if c.width == 1 and c.kind != "categorical"]
    names = np.array([modelled[j].name for j in smooth] + [encoder.given[i].name for i in simple])
    table = np.concatenate([rows.low[:, smooth], rows.features[:, start[simple]]], 1)
    names, table = names[table.std(axis=0) > 0], table[:, table.std(axis=0) > 0]
    if table.shape[1] < 2 or len(table) <= table.shape[1]:
        return
    involved = names[dependent_columns(*principal_axes(table))].tolist()
    if {column.name for column in modelled} & set(involved):
        warnings.warn(
            f"tabular.fit(frame=...): columns {involved} depend on each other linearly. Together "
            "they have no density: the likelihood has no bound. Leave one out.",
            stacklevel=4,
        )
