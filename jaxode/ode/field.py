"""The user's vector field: what it may be, and the place that calls it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from jaxode._checks.caller import arg

VectorField = Callable[[Float[Array, ""], PyTree, Any], PyTree]


class MisfitError(TypeError):
    """Raised by a field whose arguments do not fit; passes unchanged."""


class ContextError(ValueError):
    """Raised by a network whose context does not fit; passes unchanged."""


# The types with which Python and JAX report that a function does not fit its arguments. Other
# exceptions, even subclasses of these, say more and pass through unchanged.
MISFITS = (TypeError, ValueError, AttributeError, IndexError, KeyError)


def check_field(name: str, f: Any, call: str) -> None:
    """Raise unless `f` is a function."""
    if isinstance(f, type):
        raise TypeError(
            f"{arg(name)} must be a function {call}; got the class {f.__name__}. Pass an "
            "instance of it, or jaxode.nn.field with the network as the parameters."
        )
    if not callable(f):
        raise TypeError(f"{arg(name)} must be a function {call}; got {f!r}.")


def of_row(args: PyTree, row: PyTree) -> PyTree:
    """The arguments of a user's function, with those of its row, if there are any."""
    return args if row is None else (args, row)


def call_field(
    f: Callable[..., Any],
    t: Float[Array, ""],
    y: PyTree,
    args: PyTree,
    name: str = "f",
    kind: str = "the vector field",
    call: str = "(t, y, args)",
    row: PyTree = None,
) -> Any:
    """`f(t, y, args)`, with what is given for its `row`.

    An error inside `f` says what `f` was called with.
    """
    args = of_row(args, row)
    try:
        return f(t, y, args)
    except Exception as error:
        if type(error) not in MISFITS:
            raise
        pair = "" if row is None else ", the pair (args, row) of a solve with row_args"
        raise TypeError(
            f"{name}{call}: {kind} raised {type(error).__name__}: {str(error).rstrip('.')}. It got "
            f"y={_described(y)} and args={_described(args)}{pair}. Pass args that fit {name}, or "
            f"fix the line of {name} that the error above names."
        ) from error


def _described(tree: PyTree) -> str:
    """Types and shapes on one line of bounded length."""
    text = eqx.tree_pformat(tree, width=10**6)
    return text if len(text) <= 300 else f"{text[:300]}..."
