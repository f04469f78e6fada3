"""Contexts of a density, of any shape and structure."""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import (
    PYTHON_NUMBERS,
    check_integers,
    floating,
    is_list_of_numbers,
    numbers,
    takes,
)
from jaxode._checks.caller import arg
from jaxode.density.maps.base import Map
from jaxode.density.maps.bind_arguments import Shape, as_map
from jaxode.density.maps.chain import Chain
from jaxode.flows.embedding import Embedded, embedded
from jaxode.flows.reverse_kl import Target


class Contexts(eqx.Module):
    """Shapes and maps of the context, leaf by leaf."""

    maps: PyTree
    """A map for each standardized leaf, None for the others; or None for all."""
    shapes: tuple[Shape, ...] | None = eqx.field(static=True)
    """The shapes of one context. None if they are not known."""

    @classmethod
    def from_arguments(cls, standardize: Any, shape: Any, columns: bool = False) -> "Contexts":
        """From the arguments `standardize_context` and `context_shape` of `bind`.

        Args:
            columns: take a mean and deviation for each entry of the last axis, as for sets.
        """
        data = context_numbers("standardize_context", standardize)
        return cls(_maps_of(data, columns), _shapes_of(shape, data))

    def knowing(self, shapes: tuple[Shape, ...]) -> "Contexts":
        """The contexts with these shapes, unless they have shapes already."""
        return self if self.shapes is not None else dataclasses.replace(self, shapes=shapes)

    def rows(self, context: PyTree, samples: Shape) -> PyTree:
        """A context with one row for each of the samples, as the flow sees it."""
        shapes = self.shapes
        if context is None:
            if shapes:
                raise ValueError(
                    f"{arg('context')} must be given, with arrays of shape "
                    f"{', '.join(map(str, shapes))}, as bind was told; got None."
                )
            return None
        leaves, structure = jax.tree.flatten(context_numbers("context", context))
        maps, expected = jax.tree.flatten(self.maps, is_leaf=_is_map)
        if self.maps is None:
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
        leaves_with_maps = zip(leaves, shapes, maps, strict=True)
        rows = [
            _rows_of(leaf, samples, shape, of_leaf) for leaf, shape, of_leaf in leaves_with_maps
        ]
        return jax.tree.unflatten(structure, rows)

    def embedded(self, params: PyTree, context: PyTree, samples: Shape) -> tuple[PyTree, PyTree]:
        """Parameters of the field, and a context for each of the samples, as the field sees it.

        The network of `Embedded` sees each context once, whatever the number of samples.
        """
        if not isinstance(params, Embedded) or context is None or self.shapes is None:
            return embedded(params, self.rows(context, samples))
        jax.eval_shape(lambda: self.rows(context, samples))  # raises
        context_axes = self.leading_axes(context)
        params, vectors = embedded(params, self.rows(context, context_axes))

        def spread(leaf):
            row = leaf.shape[1:]
            whole = jnp.broadcast_to(leaf.reshape(*context_axes, *row), (*samples, *row))
            return whole.reshape(math.prod(samples), *row)

        return params, jax.tree.map(spread, vectors)

    def unmapped(self, row: PyTree) -> PyTree:
        """Undo the map of one context."""

        def back(part, leaf):
            return leaf if part is None else part.forward(leaf)[0]

        return jax.tree.map(back, self.maps, row, is_leaf=_is_map)

    def leading_axes(self, context: PyTree) -> Shape:
        """The axes before those of one context; none if its shape is not known."""
        leaves = jax.tree.leaves(context_numbers("context", context))
        if self.shapes is None or len(self.shapes) != len(leaves):
            return ()
        with_shapes = zip(leaves, self.shapes, strict=True)
        axes = [
            jnp.shape(leaf)[: max(jnp.ndim(leaf) - len(shape), 0)] for leaf, shape in with_shapes
        ]
        try:
            return jnp.broadcast_shapes((), *axes)
        except ValueError:  # `rows` says which does not fit
            return axes[0]


class InFlow(eqx.Module):
    """A target density as one of the flow's own samples `z` and contexts."""

    log_density: Target
    maps: Chain
    contexts: Contexts

    def __call__(self, z: Float[Array, " *event"], *row: PyTree) -> Float[Array, ""]:
        x, log_det = self.maps.forward(z)
        row = tuple(map(self.contexts.unmapped, row))
        row = row if row and takes(self.log_density, x, *row) else ()
        return self.log_density(x, *row) - log_det


def _is_map(x: Any) -> bool:
    return x is None or isinstance(x, Map)


def context_numbers(name: str, context: PyTree) -> PyTree:
    """The context with its tables as arrays. Numbers of Python stay as they are."""
    if is_list_of_numbers(context):
        raise TypeError(
            f"{arg(name)} must be an array or a pytree of arrays; got a list of numbers. Pass "
            "np.asarray of it."
        )

    def is_scalar(leaf):
        return isinstance(leaf, PYTHON_NUMBERS)

    def convert(leaf):
        return leaf if is_scalar(leaf) else numbers(name, leaf, real=False)

    return jax.tree.map(convert, context)


def _guessed_shape(leaf: Shape, samples: Shape) -> Shape:
    """Guess the shape of one context if the user did not pass it.

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


def _rows_of(leaf: Any, samples: Shape, shape: Shape, of_leaf: Map | None) -> Array:
    """Map a leaf to one context per sample, `[rows, *shape]`."""
    cut = jnp.ndim(leaf) - len(shape)
    if of_leaf is None:
        check_integers("context", leaf)
    try:
        if cut < 0 or jnp.shape(leaf)[cut:] != shape:
            raise ValueError
        leaf = leaf if of_leaf is None else floating(leaf)
        rows = jnp.broadcast_to(leaf, (*samples, *shape)).reshape(math.prod(samples), *shape)
    except ValueError:
        row_shape, remedy = jnp.shape(leaf)[max(cut, 0) :], ""
        if len(row_shape) == len(shape) > 1 and row_shape[1:] == shape[1:] and row_shape < shape:
            remedy = f" Pad sets to {shape[0]} points, by NaN for jaxode.nn.DeepSet."
        raise ValueError(
            f"{arg('context')} must be one of shape {shape}, or one for each of the samples "
            f"{samples}; got shape {jnp.shape(leaf)}.{remedy}"
        ) from None
    return rows if of_leaf is None else jax.vmap(lambda row: of_leaf.inverse(row)[0])(rows)


def _maps_of(standardize: Any, columns: bool = False) -> PyTree:
    """A map for each floating leaf of the context, None for the others.

    A plain tuple is the mean and scale; a named one is a context of several arrays.
    """
    if type(standardize) is tuple:
        if len(standardize) != 2 or any(np.ndim(part) > 1 for part in standardize):
            raise ValueError(
                "bind(standardize_context=...): must be (mean, scale), an array of data, or a "
                f"dictionary of such arrays; got a tuple of {len(standardize)} parts."
            )
        return as_map(
            "standardize_context", standardize, max(np.shape(part) for part in standardize)
        )

    def map_of_leaf(leaf):
        if isinstance(leaf, Partial):  # of `jaxode.standardize`
            if columns and jnp.ndim(leaf.args[0]) > 2:
                raise ValueError(
                    "bind(standardize_context=...): of contexts with several axes, as sets have, "
                    "a map of jaxode.standardize would map each place by itself. Pass the data, "
                    "for mean and deviation, or map all points alike beforehand."
                )
            return as_map("standardize_context", leaf, jnp.shape(leaf.args[0])[1:])
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            if columns and jnp.ndim(leaf) > 1:
                axes, size = tuple(range(jnp.ndim(leaf) - 1)), jnp.shape(leaf)[-1]
                units = jnp.nanmean(leaf, axes), jnp.nanstd(leaf, axes)
                return as_map("standardize_context", units, (size,))
            return as_map("standardize_context", leaf, jnp.shape(leaf)[1:])
        return None

    return jax.tree.map(map_of_leaf, standardize, is_leaf=lambda x: isinstance(x, Partial))


def _shapes_of(context_shape: Any, data: Any) -> tuple[Shape, ...] | None:
    """The shapes that the user passed, or those of the context data."""
    of_data = None
    if type(data) is tuple:
        shape = max(np.shape(part) for part in data)
        of_data = (shape,) if shape else None
    elif data is not None:
        of_data = tuple(jnp.shape(leaf)[1:] for leaf in jax.tree.leaves(data))
    if context_shape is not None:

        def is_size(x):
            return isinstance(x, int | np.integer) and x >= 0

        def is_shape(x):
            return isinstance(x, tuple) and all(map(is_size, x))

        shapes = jax.tree.leaves(context_shape, is_leaf=is_shape)
        if not all(map(is_shape, shapes)):
            raise TypeError(
                "bind(context_shape=...): must be a shape, a tuple of sizes such as (3,), or a "
                f"pytree of shapes; got {context_shape!r}."
            )
        shapes = tuple(tuple(map(int, shape)) for shape in shapes)

        def ends_with(shape, row_shape):
            return shape[len(shape) - len(row_shape) :] == row_shape

        if of_data and not (len(shapes) == len(of_data) and all(map(ends_with, shapes, of_data))):
            raise ValueError(
                "bind(context_shape=...): must end in that of the rows of standardize_context, "
                f"{of_data}; got {shapes}. Leave it out."
            )
        return shapes
    return of_data
