"""The data of `fit`: check the rows, set some aside, add noise, and map them to the flow."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from jaxode._checks.arguments import check_number, floating, floating_dtype, native, shape_of
from jaxode._checks.rules import INSIDE, NUMBER, Rule
from jaxode._checks.samples import check_data, check_finite, check_rows, check_weights
from jaxode.density.contexts import context_numbers
from jaxode.density.density import Density
from jaxode.density.maps.base import contained
from jaxode.density.noise import Noise, margin_of
from jaxode.flows.bases import has_full_support
from jaxode.training.column_warnings import MAX_ROWS_SEEN, warn_of_columns
from jaxode.training.dequantization import (
    Dequantization,
    RowNoise,
    is_integer,
    noise_kind,
    scanned,
)
from jaxode.training.devices import Devices
from jaxode.training.files import MAX_ROWS_COPIED, Without, check_in_parts
from jaxode.training.iterators import Stream, is_stream
from jaxode.training.sources import FromIterable, InFile, InMemory, Rows, Share, Source

MAX_VALIDATION_ROWS = 1000  # more rows set aside, or passed as validation=, are not used
MIN_ROWS = 10  # rows that `fit` needs at least, before some are set aside

PART_TYPES = int | float | np.number
PART_RULE = Rule(NUMBER, lambda part: (part > 0) & (part < 1), "must be between 0 and 1")


class DataArguments(NamedTuple):
    """The arguments of `fit` that say what to train on, as the user passed them."""

    x: Any
    context: PyTree = None
    weights: Any = None
    validation: Any = 0.1
    dequantize: bool | Noise = False

    def without_unweighted_rows(self) -> "DataArguments":
        """Leave out the rows of weight zero."""
        x, context, weights = weighted_rows(self.x, self.context, self.weights)
        return self._replace(x=x, context=context, weights=weights)


class Split(NamedTuple):
    """Rows to train on, and rows set aside."""

    source: InMemory
    aside: Rows
    weights: np.ndarray | None
    """Weights of the rows set aside; equal by default."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows to train on, rows set aside, and the noise that both get."""

    source: Source
    validation: Any
    noise: RowNoise
    weights: np.ndarray | None = None
    """Weights of the validation rows, `[rows]`; equal by default."""

    def sample(self, key: PRNGKeyArray) -> Rows:
        """Rows to fit a map to, with noise."""
        return self.noise.add(self.source.sample(MAX_ROWS_COPIED), key)

    def take(self, key: PRNGKeyArray, count: int) -> Rows:
        """Rows for the next steps, at most `count`, with new noise."""
        row_key, noise_key = jax.random.split(key)
        return self.noise.add(self.source.take(row_key, count), noise_key)

    def in_flow(
        self, density: Density, validation: Rows, key: PRNGKeyArray, count: int
    ) -> tuple[Callable[[PRNGKeyArray], Rows], Rows, float]:
        """The dataset as the flow sees it.

        Args:
            density: maps the rows.
            validation: the validation rows with their noise.
            key: draws the noise of the rows that are mapped now.
            count: the number of rows to take, at most.

        Returns:
            A function of a key that takes rows to train on; the validation rows; and the mean of
            their log-determinants less the log-densities of their noise.
        """
        together, first, whole = validation, 0, self.source.whole()
        if whole is not None:  # at once, since each number of rows is a program to compile
            together = jax.tree.map(_joined, self.noise.add(whole, key), validation)
            first = len(whole.x)
        mapped, log_det = to_flow(density, together), density.log_det(together.x)

        # Cut in NumPy, whose programs need not be compiled.
        def part(cut):
            return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[cut]), mapped)

        rows, validation_in_flow = part(slice(first)), part(slice(first, None))

        fixed = whole is not None and not self.noise.exists

        def take(key):
            return rows if fixed else to_flow(density, self.take(key, count))

        mean = float(np.average(np.asarray(log_det, np.float64)[first:], weights=self.weights))
        log_noise = self.noise.log_density(self.validation, validation)
        return take, validation_in_flow, mean - log_noise


def datasets_of_members(
    density: Density,
    data: DataArguments,
    key: PRNGKeyArray,
    *,
    devices: Devices = Devices(),
    members: int = 1,
) -> list[Dataset]:
    """Check the rows, set some aside, and warn of columns without a density.

    Returns:
        One for each member of an ensemble, with other rows aside.
    """
    noise_kind(data.dequantize)  # raises before any rows are read
    has_noise, stream = bool(data.dequantize), None
    if is_stream(data.x):
        stream = _stream_of(density, data, devices)
        x, context = stream.head
        data = data._replace(x=x, context=context)
    if data.weights is not None:
        data = data.without_unweighted_rows()
    rows = checked_rows("x", density, data.x, data.context, has_noise)
    integers, largest = scanned(rows.x)
    if isinstance(data.validation, PART_TYPES):
        splits = set_aside(rows, data.validation, key, devices, members, data.weights)
    else:
        aside = _validation_rows(density, rows, data.validation, has_noise, key)
        source = _source_of(rows, devices, weights=data.weights)
        splits = [Split(source, aside, None)] * members
        largest = np.maximum(largest, np.abs(aside.x).max(axis=0))
    integers = devices.gathered((integers & has_noise)[None]).all(axis=0)
    largest = devices.gathered(largest[None]).max(axis=0)
    noise = Dequantization.on_integers(
        data.dequantize, integers, largest, floating_dtype(rows.x.dtype)
    )
    # Called from here, since the warnings point to the call of `fit`, five frames up.
    warn_of_columns(*_columns_to_check(density, splits[0].source, integers))

    def dataset(split: Split) -> Dataset:
        source = split.source if stream is None else FromIterable(stream, split.source)
        if devices.several_processes:
            source = Share(source, devices)
        aside, weights = devices.gathered(split.aside), split.weights
        weights = None if weights is None else devices.gathered(weights)
        return Dataset(source, aside, noise, weights)

    return [dataset(split) for split in splits]


def _columns_to_check(
    density: Density, source: InMemory, integers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The arguments of `warn_of_columns`: columns of integers get noise, and are left out."""
    # Not drawn by their weights, which would repeat rows.
    x = dataclasses.replace(source, weights=None).sample(MAX_ROWS_SEEN).x
    without_noise = np.flatnonzero(~integers.reshape(-1))
    # Columns of centred rows have a sum of zero.
    independent = has_full_support(density.flow.base)
    return x.reshape(len(x), -1), without_noise, independent


def _stream_of(density: Density, data: DataArguments, devices: Devices) -> Stream:
    """The rows of an iterable, each checked when it is read."""
    if data.weights is not None:
        raise ValueError(
            "fit(weights=...): must be left out where x is an iterable. Let it give rows in "
            "proportion to their weights."
        )
    if data.context is not None:
        raise ValueError(
            "fit(context=...): must be left out where x is an iterable, which gives pairs "
            "(x, context)."
        )
    if isinstance(data.validation, PART_TYPES):
        raise ValueError(
            "fit(validation=...): must be rows of their own where x is an iterable, which may give "
            f"the same rows again; got {data.validation}."
        )

    def check(x, context):
        return checked_rows("x", density, x, context, bool(data.dequantize), least=1)

    return Stream(data.x, check, devices.any)


def _joined(a: Any, b: Any) -> np.ndarray:
    """The rows of both, in the precision of the first."""
    return np.concatenate([a, b], dtype=a.dtype if jnp.issubdtype(a.dtype, jnp.floating) else None)


def to_flow(density: Density, rows: Rows) -> Rows:
    """The rows as the flow sees them."""
    z = density.to_flow(*rows)
    return Rows(z, None) if rows.context is None else Rows(*z)


def weighted_rows(x: Any, context: PyTree, weights: Any) -> tuple[Any, PyTree, np.ndarray]:
    """Rows, contexts and weights, without the rows of weight zero."""
    x = native(np.asarray(x))
    context = check_rows("context", context, len(x))
    weights = np.asarray(check_weights(weights, jnp.zeros(len(x))))
    if weights.all():
        return x, context, weights
    used = np.flatnonzero(weights)
    return x[used], jax.tree.map(lambda leaf: leaf[used], context), weights[used]


def set_aside(
    rows: Rows,
    part: Any,
    key: PRNGKeyArray,
    devices: Devices = Devices(),
    members: int = 1,
    weights: np.ndarray | None = None,
) -> list[Split]:
    """Set rows aside for each member: a part of them, at most `MAX_VALIDATION_ROWS`.

    Where a small table has enough rows, members have none of them in common.
    """
    total, draw = len(rows.x), _generator(key)

    def weights_of(chosen):
        return None if weights is None else weights[chosen]

    def split(source: InMemory, aside: np.ndarray) -> Split:
        return Split(source, _chosen(rows, aside), weights_of(aside))

    if total > MAX_ROWS_COPIED:  # a permutation would take as long as reading all
        count = _count_aside(part, total)
        choices = [np.sort(draw.choice(total, count, replace=False)) for _ in range(members)]
        return [split(_source_of(rows, devices, aside, weights), aside) for aside in choices]
    return [
        split(_source_of(_chosen(rows, train), devices, weights=weights_of(train)), aside)
        for train, aside in split_rows(part, draw.permutation(total), members)
    ]


def split_rows(part: Any, shuffled: np.ndarray, members: int) -> list[tuple[np.ndarray, ...]]:
    """For each member, the numbers of the rows to train on, and of the rows set aside."""
    count = _count_aside(part, len(shuffled))
    turned = (np.roll(shuffled, -turn * count) for turn in range(members))
    return [(numbers[count:], numbers[:count]) for numbers in turned]


def _count_aside(part: Any, total: int) -> int:
    check_number("validation", part, PART_RULE, kind="part")
    return min(math.ceil(part * total), MAX_VALIDATION_ROWS, total - 2)


def _source_of(
    rows: Rows,
    devices: Devices,
    aside: np.ndarray = np.arange(0),
    weights: np.ndarray | None = None,
) -> InMemory:
    """The rows of this process. Leave out rows of a large table that are set `aside`."""
    exact = devices.several_processes
    if len(rows.x) <= MAX_ROWS_COPIED:
        return InMemory(rows, exact, weights)
    without = Rows(
        Without(rows.x, aside, floating_dtype(rows.x.dtype)),
        jax.tree.map(lambda leaf: Without(leaf, aside, leaf.dtype), rows.context),
    )
    return InFile(without, exact, None if weights is None else np.delete(weights, aside))


def _validation_rows(
    density: Density, rows: Rows, validation: Any, dequantize: bool, key: PRNGKeyArray
) -> Rows:
    """Check the validation rows of the user, and take at most `MAX_VALIDATION_ROWS` of them."""
    pair = validation if isinstance(validation, tuple) else (validation, None)
    if len(pair) != 2:
        raise ValueError(
            "fit(validation=...): must be a part, rows of x, or a pair (x, context); got "
            f"{len(pair)} parts."
        )
    aside = checked_rows("validation", density, *pair, dequantize, least=1)
    shape, got = (jax.tree.map(lambda leaf: leaf.shape[1:], r.context) for r in (rows, aside))
    if shape != got:
        raise ValueError(
            "fit(validation=...): must be a pair (x, context), with a context as in training, "
            f"of shape {shape}; got {got}. Leave it out where training has none."
        )
    return _chosen(aside, _generator(key).permutation(len(aside.x))[:MAX_VALIDATION_ROWS])


def _generator(key: PRNGKeyArray) -> np.random.Generator:
    """A generator of NumPy, whose programs need not be compiled."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _chosen(rows: Rows, chosen: np.ndarray) -> Rows:
    """A copy of some rows."""
    return Rows(
        np.asarray(floating(rows.x[chosen])),
        jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], rows.context),
    )


def checked_rows(
    name: str, density: Density, x: Any, context: PyTree, dequantize: bool, least: int = MIN_ROWS
) -> Rows:
    rule = f"must have shape {shape_of('rows', density.event_shape)}, with at least {least} row"
    rule, event = rule + "s" * (least > 1), density.event_shape
    large = isinstance(x, np.ndarray) and len(x) > MAX_ROWS_COPIED
    if large:
        check_in_parts(lambda part: check_data(name, part, event, 1, rule), x)
    else:
        x = check_data(name, x, event, least, rule)
    context = check_rows("context", context_numbers("context", context), len(x))
    jax.eval_shape(lambda context: density.contexts.rows(context, (len(x),)), context)  # raises
    _check_finite_contexts(density, context, len(x))
    x = x if large else np.asarray(floating(x))
    if density.support is not None:
        check_in_parts(lambda part: _check_inside(density.support, part, dequantize), x)
    return Rows(x, context)


def _check_finite_contexts(density: Density, context: PyTree, count: int) -> None:
    """Raise unless contexts are finite as the field sees them: an embedding may accept NaN."""
    if density.embed is None:
        return check_finite({"context": context})

    def check(rows):
        part = jax.tree.map(lambda leaf: leaf[rows], context)
        check_finite({"context": density.contexts.embedded(density.params, part, rows.shape)[1]})

    check_in_parts(check, np.arange(count))


def _check_inside(support: Any, x: Any, dequantize: bool) -> None:
    x = np.asarray(floating(x))
    integers, extremes = (is_integer(x) & dequantize)[None], [x]
    if integers.any():
        # A bound within a 64th of the ends of the noise is noticed only when noise falls beyond it.
        margin = margin_of(x).clip(min=1 / 64)
        extremes = [np.where(integers, x + noise, x) for noise in (margin, 1 - margin)]
    for noisy in extremes:
        INSIDE.check(contained(support, jnp.asarray(noisy)), noisy)
