"""The rows that `fit` trains on: checked, set aside, dequantized, and warned of."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, PRNGKeyArray, PyTree

from jaxode._checks.arguments import check_number, floating, floating_dtype, shape_of
from jaxode._checks.rules import INSIDE, NUMBER, Rule
from jaxode._checks.samples import check_data, check_finite, check_rows
from jaxode.density.contexts import context_numbers
from jaxode.density.density import Density
from jaxode.density.maps.base import contained
from jaxode.density.maps.whiten import WIDEST, column_list, dependent_columns, principal_axes
from jaxode.density.noise import NOISES, Noise, as_noise, in_cells, log_density, margin_of
from jaxode.flows.bases import has_full_support
from jaxode.training.files import LARGE, Without, check_in_parts, parts
from jaxode.training.iterators import NoRowsLeftError, Stream, is_stream
from jaxode.training.processes import are_several, gathered

# A value is an atom if more than this part of the rows have it, and at least three; a column has
# atoms if more than twice this part of its rows lie on them.
OFTEN = 0.01
ENOUGH = 20_000  # rows that show atoms and dependences
MAX_VALIDATION, LEAST_ROWS = 1000, 10  # validation rows, at most, and rows that there must be
COARSE = 1 / 8  # the most that dequantized integers may be apart in their dtype

PARTS = int | float | np.number
PART = Rule(NUMBER, lambda part: (part > 0) & (part < 1), "must be between 0 and 1")


class Rows(NamedTuple):
    """Data, each row with its context."""

    x: Any
    """`[rows, *event]`, in JAX or NumPy."""
    context: PyTree
    """One row for each of `x`, or None."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows to train on, rows set aside, and which of their columns get noise."""

    rows: Any
    validation: Any
    integers: Bool[np.ndarray, " *event"] | None = None
    noise: Noise = NOISES[0]
    stream: Stream | None = None
    """Gives further rows, if `rows` are the first of an iterable."""
    mesh: Mesh | None = None
    """Devices to train on; with several processes, each has rows of its own."""

    @classmethod
    def of(
        cls,
        density: Density,
        x: Any,
        context: PyTree,
        validation: Any,
        dequantize: bool | Noise,
        key,
        mesh: Mesh | None = None,
    ) -> "Table":
        """Check the rows, set some aside, and warn of columns without a density."""
        noise = NOISES[0]
        if not isinstance(dequantize, bool | np.bool_):
            noise = as_noise("dequantize", dequantize)
        has_noise = bool(dequantize)
        stream = None
        if is_stream(x):
            stream = _stream_of(density, x, context, validation, has_noise)
            x, context = stream.head
        rows, validation_rows = set_aside(density, x, context, validation, has_noise, key)
        integers, largest = scanned(rows.x)
        aside_integers, aside_largest = scanned(validation_rows.x)
        integers &= has_noise
        if isinstance(validation, PARTS):  # of the same table
            integers &= aside_integers
        largest = np.maximum(largest, aside_largest)
        integers = gathered(integers[None], mesh).all(axis=0)
        largest = gathered(largest[None], mesh).max(axis=0)
        if not isinstance(noise, str) and integers.any():
            reach = int(largest[integers].max())
            as_noise("dequantize", dequantize, (-reach, reach))
        coarse = integers & (largest * float(jnp.finfo(rows.x.dtype).eps) > COARSE)
        warn_of_coarse(coarse.reshape(-1), rows.x.dtype)
        some = rows.x.sample(ENOUGH) if isinstance(rows.x, Without) else rows.x
        columns = some.reshape(len(some), -1)
        # Those of centred rows have a sum of zero.
        independent = has_full_support(density.flow.base)
        warn_of_columns(columns, np.flatnonzero(~integers.reshape(-1)), independent)
        validation_rows = gathered(validation_rows, mesh)
        return cls(rows, validation_rows, integers & ~coarse, noise, stream, mesh)

    @property
    def has_noise(self) -> bool:
        """Whether `noisy` depends on its key."""
        return self.integers is not None and bool(self.integers.any())

    @property
    def count(self) -> int:
        """The number of rows to train on, in all processes."""
        return int(gathered(np.array([len(self.rows.x)]), self.mesh).sum())

    def some(self) -> Any:
        """Rows to fit a map to: all, or a sample of a large table."""
        take = lambda leaf: leaf.sample(LARGE) if isinstance(leaf, Without) else leaf
        return gathered(jax.tree.map(take, self.rows), self.mesh)

    def noisy(self, rows: Rows, key: PRNGKeyArray) -> Rows:
        """The rows with noise in (0, 1) on the columns of integers.

        Given validation rows may have noise of their own.
        """
        if not self.has_noise:
            return rows
        integers, x = self.integers & is_integer(rows.x), jnp.asarray(rows.x)
        noisy = in_cells(key, x, noise=self.noise)
        return rows._replace(x=jnp.where(integers[None], noisy, x))

    def log_noise(self, noisy: Rows) -> float:
        """Mean log-density of the noise of the validation rows."""
        if not self.has_noise or self.noise == NOISES[0]:
            return 0.0
        integers = self.integers & is_integer(self.validation.x)
        levels = jnp.asarray(self.validation.x[:, integers])
        log_noise = log_density(self.noise, noisy.x[:, integers] - levels, levels)
        return float(log_noise.sum(axis=1).mean())

    def in_flow(
        self, density: Density, validation_rows: Rows, key: PRNGKeyArray, most: int
    ) -> tuple[Callable[[PRNGKeyArray], Rows], Rows, float]:
        """A function of a key, the rows to train on as the flow sees them, with new noise; and the
        rows that are set aside, with the mean of their log-determinants less the log-densities of
        their noise.

        With noise, and of a large table, at most so many of them, drawn by the key; of an iterable,
        the next ones.

        Others are mapped with those set aside: each number of rows is a program to compile.
        """
        count, stream = len(self.rows.x), self.stream
        several = are_several(self.mesh)
        large = several or stream is not None or isinstance(self.rows.x, Without)
        if several:
            most //= jax.process_count()
        together, first = validation_rows, 0
        if not large:
            together = jax.tree.map(_joined, self.noisy(self.rows, key), validation_rows)
            first = count
        mapped, log_det = to_flow(density, together), density.log_det(together.x)
        # Cut in NumPy, whose programs need not be compiled.
        part = lambda cut: jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[cut]), mapped)
        rows, mapped_validation = part(slice(first)), part(slice(first, None))
        of_key = lambda key: rows
        if self.has_noise or large:

            def of_key(key):
                if several:
                    key = jax.random.fold_in(key, jax.process_index())
                row_key, key = jax.random.split(key)
                some = self.rows
                if stream is not None:
                    some = _shuffled(_next(stream, most, self.mesh), row_key)
                elif several or count > most:
                    drawn = np.asarray(jax.random.randint(row_key, (most,), 0, count))
                    some = jax.tree.map(lambda leaf: leaf[drawn], some)
                return to_flow(density, self.noisy(some, key))

        mean = float(np.asarray(log_det, np.float64)[first:].mean())
        return of_key, mapped_validation, mean - self.log_noise(validation_rows)


def _stream_of(
    density: Density, x: Any, context: PyTree, validation: Any, dequantize: bool
) -> Stream:
    """The rows of an iterable, each checked when it is read."""
    if context is not None:
        raise ValueError(
            "fit(context=...): must be left out where x is an iterable, which gives pairs "
            "(x, context)."
        )
    if isinstance(validation, PARTS):
        raise ValueError(
            "fit(validation=...): must be rows of their own where x is an iterable, which may give "
            f"the same rows again; got {validation}."
        )
    return Stream(x, lambda x, context: _checked("x", density, x, context, dequantize, least=1))


def _next(stream: Stream, count: int, mesh: Mesh | None) -> Any:
    """Take `count` rows. If the rows of one process end, all processes end."""
    rows, ended = None, None
    try:
        rows = stream.next(count)
    except NoRowsLeftError as end:
        ended = end
    if gathered(np.array([ended is not None]), mesh).any():
        raise ended or NoRowsLeftError(stream.given)
    return rows


def _shuffled(rows: Rows, key: PRNGKeyArray) -> Rows:
    seed = np.asarray(jax.random.key_data(key))
    order = np.random.default_rng(seed).permutation(len(rows.x))
    return jax.tree.map(lambda leaf: leaf[order], rows)


def _joined(a: Any, b: Any) -> np.ndarray:
    """The rows of both, in the precision of the first."""
    return np.concatenate([a, b], dtype=a.dtype if jnp.issubdtype(a.dtype, jnp.floating) else None)


def to_flow(density: Density, rows: Rows) -> Rows:
    """The rows as the flow sees them."""
    z = density.to_flow(*rows)
    return Rows(z, None) if rows.context is None else Rows(*z)


def set_aside(
    density: Density, x: Any, context: PyTree, validation: Any, dequantize: bool, key: PRNGKeyArray
) -> tuple[Rows, Rows]:
    """Rows to train on, and at most `MAX_VALIDATION` validation rows."""
    rows = _checked("x", density, x, context, dequantize)
    # In NumPy, whose programs need not be compiled.
    seed, large = np.asarray(jax.random.key_data(key)), len(rows.x) > LARGE
    order = lambda rows: np.random.default_rng(seed).permutation(len(rows.x))
    without = lambda chosen: Rows(
        Without(rows.x, chosen, floating_dtype(rows.x.dtype)),
        jax.tree.map(lambda leaf: Without(leaf, chosen, leaf.dtype), rows.context),
    )
    part = lambda rows, chosen: Rows(
        np.asarray(floating(rows.x[chosen])),
        jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], rows.context),
    )
    if not isinstance(validation, PARTS):
        pair = validation if isinstance(validation, tuple) else (validation, None)
        if len(pair) != 2:
            raise ValueError(
                "fit(validation=...): must be a part, rows of x, or a pair (x, context); got "
                f"{len(pair)} parts."
            )
        validation_rows = _checked("validation", density, *pair, dequantize, least=1)
        shape, got = (
            jax.tree.map(lambda leaf: leaf.shape[1:], r.context) for r in (rows, validation_rows)
        )
        if shape != got:
            raise ValueError(
                "fit(validation=...): must be a pair (x, context), with a context as in training, "
                f"of shape {shape}; got {got}. Leave it out where training has none."
            )
        chosen = part(validation_rows, order(validation_rows)[:MAX_VALIDATION])
        return without(np.arange(0)) if large else rows, chosen
    check_number("validation", validation, PART, kind="part")
    count = min(math.ceil(validation * len(rows.x)), MAX_VALIDATION, len(rows.x) - 2)
    if large:  # a permutation would take as long as reading all
        chosen = np.random.default_rng(seed).choice(len(rows.x), count, replace=False)
        return without(np.sort(chosen)), part(rows, np.sort(chosen))
    shuffled = order(rows)
    return part(rows, shuffled[count:]), part(rows, shuffled[:count])


def _checked(
    name: str, density: Density, x: Any, context: PyTree, dequantize: bool, least: int = LEAST_ROWS
) -> Rows:
    rule = f"must have shape {shape_of('rows', density.event_shape)}, with at least {least} row"
    rule, event = rule + "s" * (least > 1), density.event_shape
    large = isinstance(x, np.ndarray) and len(x) > LARGE
    if large:
        check_in_parts(lambda part: check_data(name, part, event, 1, rule), x)
    else:
        x = check_data(name, x, event, least, rule)
    context = check_rows("context", context_numbers("context", context), len(x))
    jax.eval_shape(lambda context: density.contexts.rows(context, (len(x),)), context)  # raises
    check_finite({"context": context})
    x = x if large else np.asarray(floating(x))
    if density.support is not None:
        check_in_parts(lambda part: _check_inside(density.support, part, dequantize), x)
    return Rows(x, context)


def _check_inside(support: Any, x: Any, dequantize: bool) -> None:
    x = np.asarray(floating(x))
    integers, ends = (is_integer(x) & dequantize)[None], [x]
    if integers.any():
        # Bounds within a 64th of the ends of the noise are found when it comes there.
        margin = margin_of(x).clip(min=1 / 64)
        ends = [np.where(integers, x + noise, x) for noise in (margin, 1 - margin)]
    for noisy in ends:
        INSIDE.check(contained(support, jnp.asarray(noisy)), noisy)


def is_integer(columns: np.ndarray) -> np.ndarray:
    """Which columns hold integers alone."""
    return (columns == np.round(columns)).all(axis=0)


def scanned(x: Any) -> tuple[Bool[np.ndarray, " *event"], np.ndarray]:
    """Which columns hold integers alone, and their largest sizes."""
    whole = x.array if isinstance(x, Without) else x
    found = [(is_integer(part), np.abs(part).max(axis=0)) for part in parts(whole)]
    integers, largest = zip(*found, strict=True)
    return np.logical_and.reduce(integers), np.maximum.reduce(largest)


def warn_of_coarse(coarse: Bool[np.ndarray, " columns"], dtype: np.dtype) -> None:
    """Warn of columns of integers beside which noise in (0, 1) is lost."""
    if coarse.any():
        warnings.warn(
            f"fit(dequantize=True): columns {column_list(np.flatnonzero(coarse))} hold whole "
            f"numbers in {dtype}, so large that noise below 1 is lost, and get none. Subtract an "
            "offset first, or use float64.",
            stacklevel=5,
        )


def warn_of_columns(
    table: Float[np.ndarray, "rows columns"],
    columns: Int[np.ndarray, " some"],
    independent: bool = True,
) -> None:
    """Warn of columns with atoms and, if they should be `independent`, of columns that depend on
    each other linearly."""
    if len(table) > ENOUGH:  # to sort all would take longer than the training
        table = table[np.random.default_rng(0).choice(len(table), ENOUGH, replace=False)]
    table = table[:, columns].astype(np.float64)  # float32 would round a dependence away
    atoms = [i for i, x in zip(columns, table.T, strict=True) if _on_atoms(x) > 2 * OFTEN]
    if atoms:
        warnings.warn(
            f"fit(x=...): columns {column_list(atoms)} repeat values, as integers, classes and "
            "rounded numbers do. They have no density: a flow narrows onto the values, and its "
            "likelihood has no bound. Pass dequantize=True for integers, add noise of the rounding "
            "to other numbers, or take classes as context. Numbers such as time stamps repeat if "
            "they are too large for the dtype: subtract an offset first.",
            stacklevel=5,
        )
    varying = table.std(axis=0) > 0
    if not independent or varying.sum() > WIDEST:  # of more, it would take minutes
        return
    involved = columns[varying][dependent_columns(*principal_axes(table[:, varying]))]
    # Of few rows, any columns are linear combinations.
    if len(involved) and len(table) > varying.sum():
        warnings.warn(
            f"fit(x=...): columns {column_list(involved)} depend on each other linearly. "
            "Together they have no density: a flow narrows onto the plane that they lie in. Leave "
            "one out.",
            stacklevel=5,
        )


def _on_atoms(column: Float[np.ndarray, " rows"]) -> float:
    """The part of the rows whose value is an atom."""
    _, counts = np.unique(column, return_counts=True)
    return float(counts[counts > max(2, OFTEN * len(column))].sum() / len(column))
