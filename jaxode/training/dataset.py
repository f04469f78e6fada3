"""What `fit` trains on: rows that are checked, some set aside, with noise, and as the flow sees
them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

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

MAX_VALIDATION_ROWS, MIN_ROWS = 1000, 10

PART_TYPES = int | float | np.number
PART_RULE = Rule(NUMBER, lambda part: (part > 0) & (part < 1), "must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows to train on, rows set aside, and the noise that both get."""

    source: Source
    validation: Any
    noise: RowNoise
    weights: np.ndarray | None = None
    """Of the validation rows, `[rows]`; equal by default."""

    @classmethod
    def of(
        cls,
        density: Density,
        x: Any,
        context: PyTree,
        validation: Any,
        dequantize: bool | Noise,
        key: PRNGKeyArray,
        devices: Devices = Devices(),
        members: int = 1,
        weights: Any = None,
    ) -> list["Dataset"]:
        """Check the rows, set some aside, and warn of columns without a density.

        Returns:
            One for each member of an ensemble, with other rows aside.
        """
        noise_kind(dequantize)  # raises before any rows are read
        has_noise, stream = bool(dequantize), None
        if is_stream(x):
            stream = _stream_of(density, x, context, validation, weights, has_noise, devices)
            x, context = stream.head
        if weights is not None:
            x, context, weights = weighted_rows(x, context, weights)
        rows = checked_rows("x", density, x, context, has_noise)
        integers, largest = scanned(rows.x)
        if isinstance(validation, PART_TYPES):
            parts = set_aside(rows, validation, key, devices, members, weights)
        else:
            aside = _validation_rows(density, rows, validation, has_noise, key)
            parts = [(_source_of(rows, devices, weights=weights), aside, None)] * members
            largest = np.maximum(largest, np.abs(aside.x).max(axis=0))
        integers = devices.gathered((integers & has_noise)[None]).all(axis=0)
        largest = devices.gathered(largest[None]).max(axis=0)
        noise = Dequantization.of(dequantize, integers, largest, floating_dtype(rows.x.dtype))
        # Not drawn by their weights, which would repeat them.
        some = dataclasses.replace(parts[0][0], weights=None).sample(MAX_ROWS_SEEN).x
        # Those of centred rows have a sum of zero.
        independent = has_full_support(density.flow.base)
        others = np.flatnonzero(~integers.reshape(-1))
        warn_of_columns(some.reshape(len(some), -1), others, independent)

        def gathered(weights):
            return None if weights is None else devices.gathered(weights)

        def of_part(own: Source, aside: Rows, weights: np.ndarray | None) -> Dataset:
            own = own if stream is None else FromIterable(stream, own)
            source = Share(own, devices) if devices.several_processes else own
            return cls(source, devices.gathered(aside), noise, gathered(weights))

        return [of_part(*part) for part in parts]

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


def _stream_of(
    density: Density,
    x: Any,
    context: PyTree,
    validation: Any,
    weights: Any,
    dequantize: bool,
    devices: Devices,
) -> Stream:
    """The rows of an iterable, each checked when it is read."""
    if weights is not None:
        raise ValueError(
            "fit(weights=...): must be left out where x is an iterable. Let it give rows in "
            "proportion to their weights."
        )
    if context is not None:
        raise ValueError(
            "fit(context=...): must be left out where x is an iterable, which gives pairs "
            "(x, context)."
        )
    if isinstance(validation, PART_TYPES):
        raise ValueError(
            "fit(validation=...): must be rows of their own where x is an iterable, which may give "
            f"the same rows again; got {validation}."
        )

    def check(x, context):
        return checked_rows("x", density, x, context, dequantize, least=1)

    return Stream(x, check, devices.any)


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
    kept = np.flatnonzero(weights)
    return x[kept], jax.tree.map(lambda leaf: leaf[kept], context), weights[kept]


def set_aside(
    rows: Rows,
    part: Any,
    key: PRNGKeyArray,
    devices: Devices = Devices(),
    members: int = 1,
    weights: np.ndarray | None = None,
) -> list[tuple[InMemory, Rows, np.ndarray | None]]:
    """For each member, the rows to train on, and a part for validation with its weights.

    A part has at most `MAX_VALIDATION_ROWS`. Those of a small table have no row in common, if they
    can.
    """
    total, draw = len(rows.x), _generator(key)

    def of(chosen):
        return None if weights is None else weights[chosen]

    if total > MAX_ROWS_COPIED:  # a permutation would take as long as reading all
        count = _count_aside(part, total)
        each = [np.sort(draw.choice(total, count, replace=False)) for _ in range(members)]
        return [
            (_source_of(rows, devices, aside, weights), _chosen(rows, aside), of(aside))
            for aside in each
        ]
    return [
        (_source_of(_chosen(rows, own), devices, weights=of(own)), _chosen(rows, aside), of(aside))
        for own, aside in split_rows(part, draw.permutation(total), members)
    ]


def split_rows(part: Any, shuffled: np.ndarray, members: int) -> list[tuple[np.ndarray, ...]]:
    """For each member, the numbers of rows to train on, and of a part of them that is set aside."""
    count = _count_aside(part, len(shuffled))
    turned = (np.roll(shuffled, -turn * count) for turn in range(members))
    return [(each[count:], each[:count]) for each in turned]


def _count_aside(part: Any, total: int) -> int:
    check_number("validation", part, PART_RULE, kind="part")
    return min(math.ceil(part * total), MAX_VALIDATION_ROWS, total - 2)


def _source_of(
    rows: Rows,
    devices: Devices,
    aside: np.ndarray = np.arange(0),
    weights: np.ndarray | None = None,
) -> InMemory:
    """The rows of this process, without those that are set aside of a large table."""
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
    """At most `MAX_VALIDATION_ROWS` of the validation rows that were given, checked."""
    pair = validation if isinstance(validation, tuple) else (validation, None)
    if len(pair) != 2:
        raise ValueError(
            "fit(validation=...): must be a part, rows of x, or a pair (x, context); got "
            f"{len(pair)} parts."
        )
    others = checked_rows("validation", density, *pair, dequantize, least=1)
    shape, got = (jax.tree.map(lambda leaf: leaf.shape[1:], r.context) for r in (rows, others))
    if shape != got:
        raise ValueError(
            "fit(validation=...): must be a pair (x, context), with a context as in training, "
            f"of shape {shape}; got {got}. Leave it out where training has none."
        )
    return _chosen(others, _generator(key).permutation(len(others.x))[:MAX_VALIDATION_ROWS])


def _generator(key: PRNGKeyArray) -> np.random.Generator:
    """Of NumPy, whose programs need not be compiled."""
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
    """Raise unless contexts are finite as the field sees them: a network may know gaps."""
    if density.embed is None:
        return check_finite({"context": context})

    def check(rows):
        part = jax.tree.map(lambda leaf: leaf[rows], context)
        check_finite({"context": density.contexts.embedded(density.params, part, rows.shape)[1]})

    check_in_parts(check, np.arange(count))


def _check_inside(support: Any, x: Any, dequantize: bool) -> None:
    x = np.asarray(floating(x))
    integers, ends = (is_integer(x) & dequantize)[None], [x]
    if integers.any():
        # Bounds within a 64th of the ends of the noise are found when it comes there.
        margin = margin_of(x).clip(min=1 / 64)
        ends = [np.where(integers, x + noise, x) for noise in (margin, 1 - margin)]
    for noisy in ends:
        INSIDE.check(contained(support, jnp.asarray(noisy)), noisy)
