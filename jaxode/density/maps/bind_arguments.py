"""The arguments `support=` and `standardize=` of `bind`, as maps around a flow."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxode._checks.arguments import floating, floating_dtype, numbers, shape_of
from jaxode._checks.caller import arg
from jaxode._checks.rules import INSIDE, is_known
from jaxode._checks.samples import check_data
from jaxode.density.maps import SUPPORTS, affine, whiten
from jaxode.density.maps.affine import Affine
from jaxode.density.maps.base import Map, contained
from jaxode.density.maps.some_columns import Some, columns_of

Shape = tuple[int, ...]


def as_support(bounds: Any, event: Shape) -> Map | None:
    """The support that a user passed: two bounds, or an object of numpyro or distrax."""
    if bounds is None:
        return None
    for support_of in SUPPORTS:
        if (support := support_of(bounds, event)) is not None:
            return support
    raise TypeError(
        "bind(support=...): must be bounds (low, high), a constraint of numpyro or a bijector "
        f"of distrax; got {bounds!r}."
    )


def as_map(
    name: str, argument: Any, event: Shape, support: Map | None = None, fixed: Shape = ()
) -> Map | None:
    """The map of the argument `name`: from data to fit it to, or its mean and scale.

    It leaves the `fixed` coordinates as they are.
    """
    if argument is None:
        return None
    fit = affine.fit
    if isinstance(argument, Partial):  # of `jaxode.standardize`
        fit, (argument,) = argument.func, argument.args
    if isinstance(argument, list):
        raise TypeError(
            f"{arg(name)} data must be an array, and mean and scale a tuple; got a list. Pass "
            "np.asarray of it, or a tuple."
        )
    if isinstance(argument, tuple):
        units, movable = _affine(name, argument, event), _movable_columns(fixed, event)
        if not fixed:
            return units

        def of_movable(part):
            return columns_of(part, event, movable) if part.ndim else part

        return Some(jax.tree.map(of_movable, units), movable)
    if callable(argument) or not np.ndim(argument):
        raise TypeError(
            f"{arg(name)} must be the data, or (mean, scale); got {argument!r}. Pass your data, an "
            f"array {shape_of('n', event)}."
        )
    rule = f"data must have shape {shape_of('n', event)}, with at least two rows"
    data = check_data(name, argument, event, 2, rule)
    if fit is not affine.fit and not is_known((data, support)):
        raise TypeError(
            f"{arg(name)} needs data that are known, to sort them; got a tracer. Call bind outside "
            "of jax.jit."
        )
    if support is not None:
        data = floating(data)
        INSIDE.check(contained(support, data), data)
    return fitted(name, data, fit, support, fixed)


def _affine(name: str, mean_and_scale: tuple[Any, Any], event: Shape) -> Affine:
    """The affine map of a mean and a scale."""
    if len(mean_and_scale) != 2:
        raise ValueError(
            f"{arg(name)} must be data, or (mean, scale); got {len(mean_and_scale)} parts."
        )
    with np.errstate(over="ignore"):  # checked below
        mean, scale = (floating(numbers(name, part)) for part in mean_and_scale)
    for part in (mean, scale):
        if part.shape not in ((), event):
            raise ValueError(
                f"{arg(name)} mean and scale must be numbers, or have shape {event}; got "
                f"{part.shape}. Pass data as an array; those of a context as standardize_context."
            )
    if is_known(scale) and not _is_scale(scale).all():
        rule = f"the scale must be positive and finite in {scale.dtype}; got {mean_and_scale[1]}."
    elif is_known(mean) and not np.isfinite(mean).all():
        rule = f"the mean must be finite in {mean.dtype}; got {mean_and_scale[0]}."
    elif (
        is_known(mean_and_scale) and (np.asarray(scale) <= _lost(mean, floating_dtype(float))).any()
    ):
        rule = (
            f"the scale must be more than the rounding of the mean; got {mean_and_scale[1]} beside "
            f"{mean_and_scale[0]}. Subtract an offset in float64 first."
        )
    else:
        return Affine(mean, scale)
    raise ValueError(f"{arg(name)} {rule}")


def _lost(mean: Any, dtype: Any) -> np.ndarray:
    """The largest scale of data that is lost in rounding, beside their mean."""
    return 4 * float(jnp.finfo(dtype).eps) * np.abs(np.asarray(mean, np.float64))


def _is_scale(x: Any) -> Any:
    """Mark scales that are finite, and that XLA does not flush to zero."""
    x = np.asarray(x)
    return (x >= jnp.finfo(x.dtype).tiny) & np.isfinite(x)


def _movable_columns(fixed: Shape, event: Shape) -> Shape:
    """The coordinates of a flattened event that are not fixed."""
    return tuple(i for i in range(math.prod(event)) if i not in fixed)


def fitted(
    name: str, data: Any, fit: Callable[..., Map], support: Map | None, fixed: Shape = ()
) -> Map:
    """The map of the data within a support, computed in float64 if they are known.

    It leaves the `fixed` coordinates as they are.
    """
    if support is not None:
        data = jax.vmap(lambda x: support.inverse(x)[0])(data)
    if not fixed:
        return _fitted(name, data, fit)
    event = data.shape[1:]
    movable = _movable_columns(fixed, event)
    at = [tuple(map(int, np.unravel_index(i, event))) for i in movable]
    try:
        return Some(_fitted(name, columns_of(data, event, movable), fit, at), movable)
    except whiten.SingularError as error:
        raise ValueError(f"{error} Columns are counted without angles.") from None


def _fitted(name: str, data: Any, fit: Callable[..., Map], at: list[Shape] | None = None) -> Map:
    """Fit the map of columns. `at` are their places in the event, for messages."""
    dtype = floating_dtype(data.dtype)
    if not is_known(data):
        return Affine(jnp.mean(data, axis=0, dtype=dtype), jnp.std(data, axis=0, dtype=dtype))
    wide = np.asarray(data, np.float64)
    mean, scale = wide.mean(axis=0), wide.std(axis=0)
    rounded_scale = scale.astype(dtype)
    constant = np.argwhere(~((scale > _lost(mean, dtype)) & _is_scale(rounded_scale)))
    if len(constant):
        index = tuple(map(int, constant[0]))
        column = at[index[0]] if at else index
        place = column[0] if len(column) == 1 else column
        which = f"got column {place} (counting from 0), which is" if column else "it is"
        cure = "Leave it out."
        if np.ptp(wide[:, *index]):
            cure = "Leave it out, or subtract its mean in float64 first and rescale it."
        raise ValueError(
            f"{arg(name)} must vary; {which} constant in {jnp.dtype(dtype).name}. {cure}"
        )
    return jax.tree.map(lambda part: jnp.asarray(part, dtype), fit(wide))
