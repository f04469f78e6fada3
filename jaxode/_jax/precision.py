"""The precision of matrix products, and of constants that are computed while JAX traces."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental
from jax._src.lax.lax import _convert_element_type
from jax.extend import linear_util
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import Array


def at_precision(precision: str | None):
    """Products that are traced here get this precision. None means the one that the user has set
    for JAX, or "highest"."""
    config: Any = jax.config
    return jax.default_matmul_precision(
        precision or config.jax_default_matmul_precision or "highest"
    )


def trace_at(precision: str | None, f: Callable[..., Any], *args: Any) -> ClosedJaxpr:
    """The program `f(*args)`, with its products and those of its derivatives at this precision.

    A product gets the precision that is set when it is traced. JAX traces the rules of a
    `jax.custom_vjp` or `jax.custom_jvp` when the program is differentiated: in a loop or by the
    user, when no function of this library is on the call stack. So `jax.default_matmul_precision`
    around the field, or around each call of it, is not enough: for a TPU, 6 of 12 products in the
    tangent of a solve are at the default then, if the field has such rules.
    """
    config: Any = jax.config
    with at_precision(precision):
        return _of_value(jax.make_jaxpr(f)(*args), config.jax_default_matmul_precision)


@linear_util.transformation2
def _rule(rule, precision, *args):
    with jax.default_matmul_precision(precision):
        return rule(*args)


@linear_util.transformation2
def _program(rule, precision, *args):
    with jax.default_matmul_precision(precision):
        jaxpr, *others = rule(*args)
    # Second derivatives have rules inside the program of a rule.
    return _of_value(jaxpr, precision), *others


# Parameters of a call to a function with custom rules: functions that return a rule as a program,
# and functions that are the rule.
_CUSTOM = {"jvp_jaxpr_fun": _program, "fwd_jaxpr_thunk": _program, "bwd": _rule}


def _of_value(value: Any, precision: str) -> Any:
    """Convert the programs in a parameter of an equation, and leave the rest."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        new = [_of_value(x, precision) for x in value]
        changed = any(a is not b for a, b in zip(new, value, strict=True))
        return type(value)(new) if changed else value
    if not isinstance(value, Jaxpr | ClosedJaxpr):
        return value
    # From JAX 0.12 on both are one class.
    if isinstance(value, ClosedJaxpr) and value.jaxpr is not value:
        jaxpr = _of_value(value.jaxpr, precision)
        return value if jaxpr is value.jaxpr else ClosedJaxpr(jaxpr, value.consts)
    jaxpr: Any = value
    equations = [_of_equation(equation, precision) for equation in jaxpr.eqns]
    changed = any(a is not b for a, b in zip(equations, jaxpr.eqns, strict=True))
    return jaxpr.replace(eqns=equations) if changed else jaxpr


def _of_equation(equation: Any, precision: str) -> Any:
    def convert(name, value):
        return _CUSTOM.get(name, _of_value)(value, precision)

    params = {name: convert(name, value) for name, value in equation.params.items()}
    changed = any(params[name] is not value for name, value in equation.params.items())
    return equation.replace(params=params) if changed else equation


@contextlib.contextmanager
def concrete_double_precision() -> Iterator[None]:
    """Compute with concrete float64 numbers, even while a program is traced."""
    try:  # a TPU has no float64
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to use no CPU
        device = None
    with jax.default_device(device), jax.ensure_compile_time_eval(), jax.enable_x64(True):
        yield


def single_precision() -> Any:
    """Compute with float32 and int32, whatever `jax_enable_x64` says."""
    return jax.enable_x64(False)


def weakly_typed(x: Array) -> Array:
    """The array with a weak type, as those that JAX makes of Python's numbers have."""
    converted: Any = _convert_element_type(x, x.dtype, weak_type=True)
    return converted
