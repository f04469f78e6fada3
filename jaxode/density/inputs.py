"""What users pass to a density, as arrays: numbers of any kind, and contexts of any shape."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._checks.arguments import (
    PYTHON_NUMBERS,
    check_integers,
    floating,
    is_list_of_numbers,
    numbers,
)
from jaxode._checks.caller import arg
from jaxode._checks.rules import in_rows, is_known
from jaxode.density.maps import Affine

Shape = tuple[int, ...]


def context_numbers(name: str, context: PyTree) -> PyTree:
    """The context with its tables as arrays. Numbers of Python stay as they are."""
    if is_list_of_numbers(context):
        raise TypeError(
            f"{arg(name)} must be an array or a pytree of arrays; got a list of numbers. Pass "
            "np.asarray of it."
        )
    is_scalar = lambda leaf: isinstance(leaf, PYTHON_NUMBERS)
    convert = lambda leaf: leaf if is_scalar(leaf) else numbers(name, leaf, real=False)
    return jax.tree.map(convert, context)


def rows_in_flow(
    context: PyTree, context_maps: PyTree, shapes: tuple[Shape, ...] | None, samples: Shape
) -> PyTree:
    """A context with one row for each of the samples, as the flow sees it."""
    if context is None:
        if shapes:
            raise ValueError(
                f"{arg('context')} must be given, with arrays of shape "
                f"{', '.join(map(str, shapes))}, as bind was told; got None."
            )
        return None
    leaves, structure = jax.tree.flatten(context_numbers("context", context))
    is_map = lambda x: x is None or isinstance(x, Affine)
    maps, expected = jax.tree.flatten(context_maps, is_leaf=is_map)
    if context_maps is None:
        maps, expected = [None] * len(leaves), structure
    if shapes is not None and len(shapes) != len(leaves):
        raise ValueError(f"{arg('context')} must have {len(shapes)} arrays; got {len(leaves)}.")
    if structure != expected:
        raise ValueError(
            f"{arg('context')} must have the structure of bind's context, {expected}; got "
            f"{structure}."
        )
    if shapes is None:
        shapes = tuple(_guessed_shape(jnp.shape(leaf), samples) for leaf in leaves)
    each = zip(leaves, shapes, maps, strict=True)
    rows = [_rows_of(leaf, samples, shape, of_leaf) for leaf, shape, of_leaf in each]
    return jax.tree.unflatten(structure, rows)


def leading_axes(context: PyTree, shapes: tuple[Shape, ...] | None) -> Shape:
    """The axes before those of one context; none if its shape is not known."""
    leaves = jax.tree.leaves(context_numbers("context", context))
    if shapes is None or len(shapes) != len(leaves):
        return ()
    each = zip(leaves, shapes, strict=True)
    axes = [jnp.shape(leaf)[: max(jnp.ndim(leaf) - len(own), 0)] for leaf, own in each]
    try:
        return jnp.broadcast_shapes((), *axes)
    except ValueError:  # `rows_in_flow` says which does not fit
        return axes[0]


def _guessed_shape(leaf: Shape, samples: Shape) -> Shape:
    """The shape of one context, if nothing says it.

    An array whose leading axes are those of the samples has one context for each of them, and any
    other array is one for all.
    """
    if leaf[: len(samples)] != samples:
        return leaf
    if leaf and leaf == samples:
        raise ValueError(
            f"{arg('context')} may be one for all samples, or a number for each; got shape "
            f"{leaf} for samples {samples}. Pass context_shape= to bind."
        )
    return leaf[len(samples) :]


def _rows_of(leaf: Any, samples: Shape, shape: Shape, of_leaf: Affine | None) -> Array:
    """One context for each of the samples, `[rows, *shape]`, by the map of the leaf."""
    cut = jnp.ndim(leaf) - len(shape)
    if of_leaf is None:
        check_integers("context", leaf)
    try:
        if cut < 0 or jnp.shape(leaf)[cut:] != shape:
            raise ValueError
        leaf = leaf if of_leaf is None else floating(leaf)
        rows = jnp.broadcast_to(leaf, (*samples, *shape)).reshape(math.prod(samples), *shape)
    except ValueError:
        raise ValueError(
            f"{arg('context')} must be one of shape {shape}, or one for each of the samples "
            f"{samples}; got shape {jnp.shape(leaf)}."
        ) from None
    return rows if of_leaf is None else of_leaf.inverse(rows)[0]


def shapes_of_context(given: Any, data: Any) -> tuple[Shape, ...] | None:
    """The shapes that were given, or those of the context data."""
    of_data = None
    if type(data) is tuple:
        shape = max(np.shape(part) for part in data)
        of_data = (shape,) if shape else None
    elif data is not None:
        of_data = tuple(jnp.shape(leaf)[1:] for leaf in jax.tree.leaves(data))
    if given is not None:
        is_size = lambda x: isinstance(x, int | np.integer) and x >= 0
        is_shape = lambda x: isinstance(x, tuple) and all(map(is_size, x))
        shapes = jax.tree.leaves(given, is_leaf=is_shape)
        if not all(map(is_shape, shapes)):
            raise TypeError(
                "bind(context_shape=...): must be a shape, a tuple of sizes such as (3,), or a "
                f"pytree of shapes; got {given!r}."
            )
        shapes = tuple(tuple(map(int, shape)) for shape in shapes)
        ends = lambda shape, own: shape[len(shape) - len(own) :] == own
        if of_data and not (len(shapes) == len(of_data) and all(map(ends, shapes, of_data))):
            raise ValueError(
                "bind(context_shape=...): must end in that of the rows of standardize_context, "
                f"{of_data}; got {shapes}. Leave it out."
            )
        return shapes
    return of_data


def check_inside(inside: Bool[Array, " rows"], rows: Float[Array, "rows *event"]) -> None:
    """Raise if finite rows are known to lie outside the support."""
    if is_known((inside, rows)):
        finite = np.isfinite(np.asarray(rows)).all(axis=tuple(range(1, rows.ndim)))
        outside = ~np.asarray(inside) & finite
        if outside.any():
            raise ValueError(
                f"{arg('support')} the data must lie strictly inside; got values on or outside it "
                f"in {in_rows(outside)}. Widen the support, or leave those rows out."
            )


def check_fits(fits: Bool[Array, " rows"]) -> None:
    """Raise if finite rows are known to be so far away that the maps overflow."""
    if is_known(fits) and not np.asarray(fits).all():
        raise ValueError(
            f"{arg('x')} must not be so far from the data of standardize= that the map overflows; "
            f"got {in_rows(~np.asarray(fits))}. Leave those rows out, or rescale the data."
        )
