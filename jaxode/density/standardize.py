"""The argument `standardize=` of `bind`: from what a user passes to maps around a flow."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxode import standardize as maps
from jaxode._checks.arguments import (
    PYTHON_NUMBERS,
    described,
    is_list_of_numbers,
    native,
    numeric_dtype,
    shape_of,
)
from jaxode._checks.caller import arg
from jaxode._checks.errors import in_rows
from jaxode._checks.rules import is_known
from jaxode.density.support import Support

WHERE = "bind"


def floating(x: Any) -> Array:
    """A floating array. Integers get the default floating dtype."""
    x = jnp.asarray(x)
    return x.astype(_floating_dtype(x.dtype))


def _floating_dtype(dtype: Any) -> Any:
    # `jnp.result_type` warns of a float64 that JAX does not have.
    return jax.dtypes.canonicalize_dtype(dtype if jnp.issubdtype(dtype, jnp.floating) else float)


def numbers(what: str, x: Any, real: bool = True) -> Any:
    """An array of numbers, `real` or not. Raises for text, objects and masked arrays."""
    if is_known(x) and not isinstance(x, jax.Array | np.ndarray):
        try:
            x = np.asarray(x)
        except ValueError:
            raise TypeError(
                f"{what} must be an array of numbers; got a {type(x).__name__} whose entries "
                "differ in shape. Fill or cut them to one shape."
            ) from None
    x = native(x)
    if isinstance(x, np.ndarray) and numeric_dtype(x) is None:
        raise TypeError(
            f"{what} must be an array of numbers; got {described(x)}. Encode text as numbers or "
            "leave it out, fill what is masked, and convert with .astype(np.float32)."
        )
    if real and jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        raise TypeError(f"{what} must be real; got {x.dtype}. Pass real and imaginary parts.")
    return x


def context_numbers(what: str, context: PyTree) -> PyTree:
    """The context with its tables as arrays. Numbers of Python stay as they are."""
    if is_list_of_numbers(context):
        raise TypeError(
            f"{what} must be an array or a pytree of arrays; got a list of numbers. Pass "
            "np.asarray of it."
        )
    is_scalar = lambda leaf: isinstance(leaf, PYTHON_NUMBERS)
    convert = lambda leaf: leaf if is_scalar(leaf) else numbers(what, leaf, real=False)
    return jax.tree.map(convert, context)


def split(standardize: Any, event: tuple[int, ...]) -> tuple[Any, Any]:
    """The parts for `x` and for the context."""
    if not isinstance(standardize, tuple) or isinstance(standardize, maps.Unfitted):
        return standardize, None
    if len(standardize) != 2:
        raise ValueError(
            f"{arg('standardize')} must be data, (mean, scale), or a pair of such for x and "
            f"context; got {len(standardize)} parts."
        )
    first = standardize[0]
    pair = first is None or isinstance(first, tuple) or jnp.ndim(first) == len(event) + 1
    return standardize if pair else (standardize, None)


def as_map(
    name: str, given: Any, event: tuple[int, ...], support: Support | None = None
) -> maps.Map | None:
    """The given map, or the map that standardizes the given data."""
    if given is None:
        return None
    fit = maps.fit_affine
    if isinstance(given, maps.Unfitted):
        given, fit = given
    if isinstance(given, list):
        raise TypeError(
            f"{arg('standardize')} data of {name} must be an array, and mean and scale a "
            "tuple; got a list. Pass np.asarray of it, or a tuple."
        )
    if isinstance(given, tuple):
        with np.errstate(over="ignore"):  # told of below
            mean, scale = map(floating, given)
        for part in (mean, scale):
            if part.shape not in ((), event):
                raise ValueError(
                    f"{arg('standardize')} mean and scale of {name} must be numbers, or have "
                    f"shape {event}; got {part.shape}."
                )
        if is_known(scale) and not (np.isfinite(scale).all() and (np.asarray(scale) > 0).all()):
            raise ValueError(
                f"{arg('standardize')} the scale of {name} must be positive and finite in "
                f"{scale.dtype}; got {given[1]}."
            )
        if is_known(mean) and not np.isfinite(mean).all():
            raise ValueError(
                f"{arg('standardize')} the mean of {name} must be finite in {mean.dtype}; got "
                f"{given[0]}."
            )
        return maps.Affine(mean, scale)
    if not jnp.ndim(given):
        raise TypeError(
            f"{arg('standardize')} must be the data, or (mean, scale); got {given!r}. Pass "
            f"your data, an array {shape_of('n', event)}."
        )
    data = numbers(f"{arg('standardize')} data of {name}", given)
    if data.shape[1:] != event or data.ndim != len(event) + 1 or len(data) < 2:
        raise ValueError(
            f"{arg('standardize')} data of {name} must have shape {shape_of('n', event)}, "
            f"with at least two rows; got {data.shape}."
        )
    if is_known(data):
        data = np.asarray(data)
        _check_fit(name, data)
    if support is not None:
        rows = floating(data)
        check_inside(jax.vmap(support.contains)(rows), rows)
        data = jax.vmap(lambda x: support.inverse(x)[0])(rows)
    return _fitted(name, data, fit)


def check_inside(inside: Any, rows: Any) -> None:
    """Raise if finite rows are known to lie outside the support."""
    if is_known((inside, rows)):
        finite = np.isfinite(np.asarray(rows)).all(axis=tuple(range(1, rows.ndim)))
        outside = ~np.asarray(inside) & finite
        if outside.any():
            raise ValueError(
                f"{arg('support')} the data must lie strictly inside; got values outside it "
                f"in {in_rows(outside)}. Widen the support, or leave those rows out."
            )


def _check_fit(name: str, data: np.ndarray) -> None:
    """Raise for NaN and infinity, and for numbers that JAX's dtype makes infinite."""
    dtype = _floating_dtype(data.dtype)
    with np.errstate(over="ignore"):
        narrow = data.astype(dtype)
    for values, rule, cure in (
        (data, "be finite; got NaN or inf", "Leave those rows out."),
        (narrow, f"fit {dtype}; got larger numbers", "Rescale the data, or leave those rows out."),
    ):
        bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if bad.any():
            raise ValueError(
                f"{arg('standardize')} data of {name} must {rule} in {in_rows(bad)}. {cure}"
            )


def _fitted(name: str, data: Any, fit: Any) -> maps.Map:
    """The map of the data, computed in float64 if they are known."""
    dtype = _floating_dtype(data.dtype)
    if not is_known(data):
        if fit is not maps.fit_affine:
            raise TypeError(
                f"{arg('standardize')} needs data of {name} that are known, to sort them; got "
                "a tracer. Call bind outside of jax.jit."
            )
        return maps.Affine(jnp.mean(data, axis=0, dtype=dtype), jnp.std(data, axis=0, dtype=dtype))
    wide = np.asarray(data, np.float64)
    mean, scale = wide.mean(axis=0), wide.std(axis=0)
    kept, lost = scale.astype(dtype), 4 * float(jnp.finfo(dtype).eps) * np.abs(mean)
    constant = np.argwhere(~((scale > lost) & (kept > 0) & np.isfinite(kept)))
    if constant.size:
        column = tuple(map(int, constant[0]))
        place = column[0] if len(column) == 1 else column
        cure = "Leave it out."
        if np.ptp(wide[:, *column]):
            cure = "Leave it out, or subtract its mean in float64 first and rescale it."
        raise ValueError(
            f"{arg('standardize')} {name} must vary; got column {place} (counting from 0), "
            f"which is constant in {jnp.dtype(dtype).name}. {cure}"
        )
    return jax.tree.map(lambda part: jnp.asarray(part, dtype), fit(wide))


def of_context(given: Any) -> PyTree:
    """A map for each floating leaf of the context."""
    if given is None:
        return None
    if isinstance(given, tuple):
        if len(given) != 2 or any(jnp.ndim(part) > 1 for part in given):
            raise ValueError(
                f"{arg('standardize')} for a context, must be (mean, scale), an array of "
                f"data, or a dictionary of such arrays; got a tuple of {len(given)} parts."
            )
        return as_map("context", given, max(jnp.shape(part) for part in given))
    is_floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    one = lambda x: as_map("context", x, jnp.shape(x)[1:]) if is_floating(x) else None
    return jax.tree.map(one, given)
