"""Check a user's functions of an observed system, and the options of its solves."""

import inspect
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from jaxode._checks.arguments import described, takes
from jaxode._checks.caller import arg, caller
from jaxode.ode.solve import solve


def check_function(
    name: str, function: Any, calls: Iterable[str], others: Iterable[str] = ()
) -> None:
    """Raise unless a function takes the arguments of one of the calls, such as "t, y, params".

    The message mentions other calls that are possible with `row_args`.
    """
    if not callable(function):
        raise TypeError(f"{arg(name)} must be a function; got {function!r}.")
    if not any(takes(function, *call.split(", ")) for call in calls):
        said = ", or ".join(f"({call})" for call in (*calls, *others))
        said += " with row_args" if "row" in said else ""
        raise TypeError(
            f"{arg(name)} must be a function {said}; got one of {inspect.signature(function)}."
        )


def check_observed_shape(returned: Any, shape: tuple[int, ...], whose: str = "ys") -> None:
    """Raise unless what `observe` returned for all times has the shape of the observations.

    Another one would broadcast with them.
    """
    if getattr(returned, "shape", None) != shape:
        raise ValueError(
            f"{arg('observe')} must return one observation, so that together they are like "
            f"{whose}, {shape}; got {_shape_or_object(returned)}."
        )


def check_noise_shape(returned: Any, shape: tuple[int, ...], what: str) -> None:
    """Raise unless what `noise` returned broadcasts with `what` has the shape."""
    if not broadcasts(getattr(returned, "shape", (-1,)), shape):
        raise ValueError(
            f"{arg('noise')} must return what broadcasts with {what}, {shape}; got "
            f"{_shape_or_object(returned)}."
        )


def _shape_or_object(returned: Any) -> str:
    """What a function returned, in the words of a message."""
    return f"shape {returned.shape}" if hasattr(returned, "shape") else described(returned)


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of a shape broadcasts to another one."""
    try:
        return jnp.broadcast_shapes(shape, to) == to
    except (ValueError, TypeError):
        return False


def index_with_axis(axes: int) -> str:
    """The code that gives observations with so many axes a last one, for a state of one number."""
    return f"ys[{', '.join(':' * axes)}, None], since y0 is an array"


def check_options(options: dict[str, Any], excluded: Iterable[str]) -> None:
    """Raise for options that are none of `solve`, or are among those that the caller sets."""
    allowed = inspect.signature(solve).parameters.keys() - set(excluded)
    if wrong := [name for name in options if name not in allowed]:
        raise TypeError(f"{arg(wrong[0])} is not an option of {caller()}. Leave it out.")
