"""The user's vector field: the methods that it may have, and the place that calls it."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from jaxode._checks.caller import arg
from jaxode._checks.traced import traced_use

VectorField = Callable[[Float[Array, ""], PyTree, Any], PyTree]


class Field:
    """A vector field `f(t, y, args)` of one sample, and what it may offer beside its call.

    A function is a vector field. An object, such as an Equinox module, may have any of these
    methods. Those that it lacks do what they do here, whether or not its class inherits from this
    one (`jaxode.ode.field.Field`).
    """

    def __call__(self, t: Float[Array, ""], y: PyTree, args: Any) -> PyTree:
        """The time derivative of the state `y`. In a flow, `y` is a sample `[*event]`."""
        raise NotImplementedError

    def value_and_divergence(self, t: Float[Array, ""], y: Float[Array, " *event"], args: Any):
        """`(f(t, y, args), divergence of f by y)` in closed form, in `jaxode.cnf`.

        `NotImplemented` if there is no closed form for these arguments. Python decides, while a
        program is traced.
        """
        del t, y, args
        return NotImplemented

    def is_centered(self, args: Any) -> bool:
        """Whether, for particles, it keeps their mean and does not depend on it.

        `jaxode.cnf` then leaves the mean to the field. It subtracts it from other fields if the
        base is `jaxode.centered_normal`.
        """
        del args
        return False

    def check_span(self, t0: Any, t1: Any) -> Any:
        """The time `t0` of the base in `jaxode.cnf`, for a field that fixes the direction of time.

        Raises if the field does not go from `t0` to `t1`. NaN if only the run can tell.
        """
        del t1
        return t0

    def span_faults(self, t0: Any) -> dict[str, Callable[[], Any]]:
        """A sentence for the message of a failed solve if `check_span` returned NaN, and a function
        that says whether it applies."""
        del t0
        return {}


class Completed(Field):
    """A callable with the methods of `Field`: its own, and the defaults for those it lacks.

    All other code asks a field through this class. Networks are asked as fields whose `args` are
    the context, if they have one.
    """

    def __init__(self, f: Callable[..., Any]):
        self.f = f

    def __call__(self, t, y, *args):
        return self.f(t, y, *args)

    def value_and_divergence(self, t, y, *args):
        method = getattr(self.f, "value_and_divergence", None)
        return super().value_and_divergence(t, y, args) if method is None else method(t, y, *args)

    def is_centered(self, *args):
        method = getattr(self.f, "is_centered", None)
        if method is None:
            return super().is_centered(args)
        return bool(method(*args) if callable(method) else method)  # a network has a property

    def check_span(self, t0, t1):
        return getattr(self.f, "check_span", super().check_span)(t0, t1)

    def span_faults(self, t0):
        return getattr(self.f, "span_faults", super().span_faults)(t0)


class SystemField(eqx.Module):
    """The vector field of a `System`, `f(t, y, shared, row)` of one row, and its name in messages.

    `System.field` may also be a function, which has the defaults.
    """

    f: Callable[..., PyTree]
    jacobian: Callable[..., Array] | None = None
    """The user's Jacobian by the state, a function of the arguments of `f`, or None."""
    name: ClassVar[str] = "f"
    call: ClassVar[str] = "(t, y, args)"
    hint: ClassVar[str] = ""
    """A sentence for a derivative of the wrong shape in a batch."""

    @classmethod
    def of_function(cls, field: Callable[..., PyTree]) -> "SystemField":
        return field if isinstance(field, cls) else cls(field)

    def __call__(self, t, y, shared, row):
        return self.f(t, y, shared, row)


class MisfitError(TypeError):
    """Raised by a field whose arguments do not fit; passes unchanged."""


class ContextError(ValueError):
    """Raised by a network whose context does not fit; passes unchanged."""


# The types with which Python and JAX report that a function does not fit its arguments. Other
# exceptions, even subclasses of these, say more and pass through unchanged.
MISFITS = (TypeError, ValueError, AttributeError, IndexError, KeyError)


TIME_NAMES = ("t", "time")  # of the first parameter of a field
STATE_NAMES = ("y", "x", "z", "u", "state")  # of the second one


def check_field(name: str, f: Any, call: str) -> None:
    """Raise unless `f` is a function, and if the names of time and state are in another order."""
    if isinstance(f, type):
        raise TypeError(
            f"{arg(name)} must be a function {call}; got the class {f.__name__}. Pass an "
            "instance of it, or jaxode.nn.field with the network as the parameters."
        )
    if not callable(f):
        raise TypeError(f"{arg(name)} must be a function {call}; got {f!r}.")
    got = _first_two(f)
    kinds = [
        [parameter in TIME_NAMES for parameter in names]
        if {*names} <= {*TIME_NAMES, *STATE_NAMES}
        else None
        for names in (call.partition("(")[2].rstrip(")").split(", ")[:2], got)
    ]
    if kinds in ([[True, False], [False, True]], [[False, True], [True, False]]):
        raise TypeError(
            f"{arg(name)} must be a function {call}, called by position; got one of "
            f"({', '.join(got)}), in another order. Exchange its first two parameters."
        )


def _first_two(f: Callable[..., Any]) -> list[str]:
    """The names of the first two parameters by position, as far as Python knows."""
    try:
        # A function that it wraps may have its parameters in another order.
        parameters = list(inspect.signature(f, follow_wrapped=False).parameters.values())
    except (TypeError, ValueError):
        return []
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [parameter.name for parameter in parameters[:2] if parameter.kind in positional]


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
    """`f(t, y, args)`, or `f(t, y, (args, row))` if there is a `row`.

    An error inside `f` says what `f` was called with.
    """
    args = of_row(args, row)
    try:
        return f(t, y, args)
    except Exception as error:
        if traced := traced_use(name, error):
            raise MisfitError(traced) from error
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
