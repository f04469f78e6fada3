"""Base class of the networks of `jaxode.nn`: a layer, the call, and `pickle`."""

import abc
import functools
import itertools
import math
import pkgutil
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode.ode.field import ContextError, MisfitError

WAVES = 4  # the largest frequency of the time, in half turns over [0, 1]


def _name_of(function: Any) -> Any:
    """`module:name` of a function that can be imported by it, else the function itself.

    `pickle` writes names of plain functions only, not of what `jax.jit` or `jax.custom_jvp` return.
    """
    try:
        name = f"{function.__module__}:{function.__qualname__}"
        return name if pkgutil.resolve_name(name) is function else function
    except (AttributeError, ImportError, ValueError):
        return function


def waves(t: Float[Array, ""], dtype: Any) -> list[Array]:
    """The time as a network sees it."""
    angles = jnp.pi * t * jnp.arange(1, WAVES + 1, dtype=dtype)
    return [jnp.sin(angles), jnp.cos(angles)]


def encoded_context(
    t, context, encoder: Any, activation: Callable[[Array], Array], dtype: Any
) -> Array:
    """Encode the time by waves, and the context by two layers."""
    encoded = waves(t, dtype)
    if encoder is not None:
        inner, outer = encoder
        encoded.append(outer(activation(inner(context))))
    return jnp.concatenate(encoded)


def equal_parts(layer: "Dense", e: Array, count: int) -> list[Array]:
    """`layer(e)` in equal parts.

    It multiplies by parts of the weights: parts of the outputs of a batch would be copied.
    """
    weights, biases = (jnp.split(leaf, count) for leaf in (layer.weight, layer.bias))
    return [e @ weight.T + bias for weight, bias in zip(weights, biases, strict=True)]


@functools.partial(jax.jit, static_argnums=1)
def draws(key: PRNGKeyArray, shapes: tuple[tuple[int, ...], ...]) -> list[Array]:
    """Arrays of these shapes with numbers between -1 and 1.

    They are cut from one draw, because each draw compiles a program for a third of a second.
    """
    sizes = [math.prod(shape) for shape in shapes]
    flat = jax.random.uniform(key, (sum(sizes),), minval=-1.0, maxval=1.0)
    drawn = jnp.split(flat, list(itertools.accumulate(sizes))[:-1])
    return [part.reshape(shape) for part, shape in zip(drawn, shapes, strict=True)]


class Dense(eqx.Module):
    """`W x + b`."""

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"]

    def __init__(self, drawn: Float[Array, "out in"], scale: float = 1.0):
        size_out, size_in = drawn.shape
        self.weight = drawn * (scale / math.sqrt(size_in))
        self.bias = jnp.zeros(size_out)

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        return self.weight @ x + self.bias


class Network(eqx.Module):
    """A network `m(t, y, context)` of one sample, which `pickle` writes with its activation."""

    activation: eqx.AbstractVar[Callable[[Array], Array]]

    sized_by: ClassVar[str] = "event_shape"
    """The argument that says how many numbers a sample has."""

    def __check_init__(self):
        if not callable(self.activation):
            raise TypeError(
                f"{type(self).__name__}(activation=...): must be a function; got "
                f"{self.activation!r}. Pass one such as jax.nn.silu."
            )

    def __call__(
        self,
        t: Float[Array, ""],
        y: Float[Array, " *event"],
        context: Float[Array, " context"] | None = None,
    ) -> Float[Array, " *event"]:
        return self._field(t, self._vector(y, context), context).reshape(y.shape)

    def value_and_divergence(
        self,
        t: Float[Array, ""],
        y: Float[Array, " *event"],
        context: Float[Array, " context"] | None = None,
    ) -> Any:
        """`(m(t, y), div m)` in closed form. `NotImplemented` if there is none."""
        if type(self).__call__ is not Network.__call__:  # a subclass with a field of its own
            return NotImplemented
        closed_form = self._closed_form(t, self._vector(y, context), context)
        return (
            closed_form
            if closed_form is NotImplemented
            else (closed_form[0].reshape(y.shape), closed_form[1])
        )

    @abc.abstractmethod
    def _field(self, t, x: Float[Array, " size"], context) -> Float[Array, " size"]:
        """The field of a flattened sample."""

    def _closed_form(self, t, x: Float[Array, " size"], context) -> Any:
        """`value_and_divergence` of a flattened sample."""
        return NotImplemented

    @property
    @abc.abstractmethod
    def _sizes(self) -> tuple[int, int]:
        """The numbers of a sample and of a context."""

    def _vector(self, y: Any, context: Any) -> Float[Array, " size"]:
        """The sample, flattened. Raises unless it and the context have the sizes of the network."""
        name, (size, context_size) = type(self).__name__, self._sizes
        if isinstance(context, eqx.Module):
            raise TypeError(
                f"{name}(t, y, context): the context must be a vector; got a network. For a vector "
                "field whose params are the network, pass f=jaxode.nn.field."
            )
        shape = None if context is None else jnp.shape(context)
        if shape != ((context_size,) if context_size else None):
            cure = f"Pass context=, with {context_size} numbers for each sample."
            if not context_size:
                cure = "Leave it out, or make the network with context_size=."
            raise ContextError(
                f"{name}(context_size={context_size}): the context of a sample must be a vector of "
                f"this size, and None for size 0; got shape {shape}. {cure}"
            )
        if not self._fits(y.shape):
            cure = f"Make it with {self.sized_by}={y.shape}, or fix the samples."
            if y.ndim > 1 and self._fits(y.shape[1:]):
                cure = (
                    f"If these are {len(y)} samples, let their axis be that of a batch, by "
                    "batch='joint' of jaxode.solve."
                )
            raise MisfitError(
                f"{name}({self.sized_by}=...): the network was made for samples of "
                f"{f'shape {self._shape}' if self._shape else f'{size} numbers'}; got a sample of "
                f"shape {y.shape}. {cure}"
            )
        return y.reshape(-1)

    @property
    def _shape(self) -> tuple[int, ...] | None:
        """The shape of a sample, if a sample of another shape would mix up its numbers."""
        return None

    def _fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a sample may have this shape."""
        size = self._sizes[0]
        if self._shape:
            return shape in (self._shape, (size,))
        return math.prod(shape) == size

    def __getstate__(self):
        return vars(self) | {"activation": _name_of(self.activation)}

    def __setstate__(self, state):
        activation = state["activation"]
        function = pkgutil.resolve_name(activation) if isinstance(activation, str) else activation
        vars(self).update(state, activation=function)


class Symmetric(Network):
    """A network whose coefficients depend on the time and the context, by a hidden layer."""

    hidden: Dense
    last: Dense
    event_shape: tuple[int, ...] = eqx.field(static=True)
    context_size: int = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    @property
    def _sizes(self):
        return math.prod(self.event_shape), self.context_size

    @property
    def _shape(self):
        return self.event_shape

    def _encoded(self, t, context) -> Float[Array, " encoded"]:
        """Waves of the time, and the context."""
        encoded = waves(t, self.hidden.bias.dtype)
        return jnp.concatenate(encoded if context is None else [*encoded, context])
