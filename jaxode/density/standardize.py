"""The arguments `standardize=` and `standardize_context=` of `bind`, as maps around a flow."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxode._checks.arguments import floating, floating_dtype, numbers, shape_of
from jaxode._checks.caller import arg
from jaxode._checks.rules import in_rows, is_known
from jaxode._checks.samples import check_finite
from jaxode.density.inputs import Shape, check_inside
from jaxode.density.maps import Affine, Map, Unfitted, contained, fit_affine


def as_map(name: str, given: Any, event: Shape, support: Map | None = None) -> Map | None:
    """The map of the argument `name`: from data to fit it to, or its mean and scale."""
    if given is None:
        return None
    fit = fit_affine
    if isinstance(given, Unfitted):
        given, fit = given
    if isinstance(given, list):
        raise TypeError(
            f"{arg(name)} data must be an array, and mean and scale a tuple; got a list. Pass "
            "np.asarray of it, or a tuple."
        )
    if isinstance(given, tuple):
        return _affine(name, given, event)
    if callable(given) or not np.ndim(given):
        raise TypeError(
            f"{arg(name)} must be the data, or (mean, scale); got {given!r}. Pass your data, an "
            f"array {shape_of('n', event)}."
        )
    data = numbers(name, given)
    if data.shape[1:] != event or len(data) < 2:
        raise ValueError(
            f"{arg(name)} data must have shape {shape_of('n', event)}, with at least two rows; got "
            f"{data.shape}."
        )
    if is_known(data):
        check_values(name, np.asarray(data))
    if fit is not fit_affine and not is_known((data, support)):
        raise TypeError(
            f"{arg(name)} needs data that are known, to sort them; got a tracer. Call bind outside "
            "of jax.jit."
        )
    if support is not None:
        data = floating(data)
        check_inside(contained(support, data), data)
    return fitted(name, data, fit, support)


def _affine(name: str, given: tuple[Any, Any], event: Shape) -> Affine:
    """From mean and scale."""
    if len(given) != 2:
        raise ValueError(f"{arg(name)} must be data, or (mean, scale); got {len(given)} parts.")
    with np.errstate(over="ignore"):  # checked below
        mean, scale = (floating(numbers(name, part)) for part in given)
    for part in (mean, scale):
        if part.shape not in ((), event):
            raise ValueError(
                f"{arg(name)} mean and scale must be numbers, or have shape {event}; got "
                f"{part.shape}. Pass data as an array; those of a context as standardize_context."
            )
    if is_known(scale) and not _is_scale(scale).all():
        raise ValueError(
            f"{arg(name)} the scale must be positive and finite in {scale.dtype}; got {given[1]}."
        )
    if is_known(mean) and not np.isfinite(mean).all():
        raise ValueError(f"{arg(name)} the mean must be finite in {mean.dtype}; got {given[0]}.")
    if (
        is_known((mean, scale))
        and not (np.asarray(scale) > _lost(mean, floating_dtype(float))).all()
    ):
        raise ValueError(
            f"{arg(name)} the scale must be more than the rounding of the mean; got {given[1]} "
            f"beside {given[0]}. Subtract an offset in float64 first."
        )
    return Affine(mean, scale)


def _lost(mean: Any, dtype: Any) -> np.ndarray:
    """The scale of data around a mean that is lost in their rounding."""
    return 4 * float(jnp.finfo(dtype).eps) * np.abs(np.asarray(mean, np.float64))


def _is_scale(x: Any) -> Any:
    """Where a scale is finite, and large enough that XLA does not take it for zero."""
    x = np.asarray(x)
    return (x >= jnp.finfo(x.dtype).tiny) & np.isfinite(x)


def check_values(name: str, data: np.ndarray) -> None:
    """Raise for NaN and infinity, and for numbers that JAX's dtype makes infinite."""
    dtype = floating_dtype(data.dtype)
    with np.errstate(over="ignore"):
        narrow = data.astype(dtype)
    lost = (np.isfinite(data) & ~np.isfinite(narrow)).reshape(len(data), -1).any(axis=1)
    if lost.any():
        raise ValueError(
            f"{arg(name)} data must fit {dtype}; got larger numbers in {in_rows(lost)}. Rescale "
            "the data, or leave those rows out."
        )
    check_finite({name: narrow})


def fitted(name: str, data: Any, fit: Callable[..., Map], support: Map | None) -> Map:
    """The map of the data within a support, computed in float64 if they are known."""
    if support is not None:
        data = jax.vmap(lambda x: support.inverse(x)[0])(data)
    dtype = floating_dtype(data.dtype)
    if not is_known(data):
        return Affine(jnp.mean(data, axis=0, dtype=dtype), jnp.std(data, axis=0, dtype=dtype))
    wide = np.asarray(data, np.float64)
    mean, scale = wide.mean(axis=0), wide.std(axis=0)
    kept = scale.astype(dtype)
    constant = np.argwhere(~((scale > _lost(mean, dtype)) & _is_scale(kept)))
    if len(constant):
        column = tuple(map(int, constant[0]))
        place = column[0] if len(column) == 1 else column
        which = f"got column {place} (counting from 0), which is" if column else "it is"
        cure = "Leave it out."
        if np.ptp(wide[:, *column]):
            cure = "Leave it out, or subtract its mean in float64 first and rescale it."
        raise ValueError(
            f"{arg(name)} must vary; {which} constant in {jnp.dtype(dtype).name}. {cure}"
        )
    return jax.tree.map(lambda part: jnp.asarray(part, dtype), fit(wide))


def check_affine(given: Any) -> None:
    """Raise for another map of a context."""
    unfitted = lambda x: isinstance(x, Unfitted)
    if any(map(unfitted, jax.tree.leaves(given, is_leaf=unfitted))):
        raise TypeError(
            "bind(standardize_context=...): a context has affine maps only; got one of "
            "jaxode.standardize. Pass the data themselves."
        )


def context_maps(given: Any) -> PyTree:
    """A map for each floating leaf of the context, None for the others.

    A plain tuple is the mean and scale; a named one is a context of several arrays.
    """
    if type(given) is tuple:
        if len(given) != 2 or any(np.ndim(part) > 1 for part in given):
            raise ValueError(
                "bind(standardize_context=...): must be (mean, scale), an array of data, or a "
                f"dictionary of such arrays; got a tuple of {len(given)} parts."
            )
        return as_map("standardize_context", given, max(np.shape(part) for part in given))
    is_floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    one = lambda x: as_map("standardize_context", x, jnp.shape(x)[1:]) if is_floating(x) else None
    return jax.tree.map(one, given)
