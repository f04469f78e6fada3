"""Full precision of matrix products, also in rules of differentiation that JAX traces later."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental
from jax.extend import linear_util
from jax.extend.core import ClosedJaxpr, Jaxpr

# What a call of a function with rules of its own holds: functions that give a rule as a program,
# and functions that are the rule.
_PROGRAMS = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk")
_RULES = ("bwd",)


def at_full_precision(program: ClosedJaxpr) -> ClosedJaxpr:
    """The program, traced at full precision, with rules of differentiation that will be, too.

    A product has the precision that is set when it is traced. JAX traces the rules of a
    `jax.custom_vjp` or `jax.custom_jvp` when the program is differentiated: in a loop, or by the
    user, at a time when nothing of this library is on the call stack.
    """
    return _of_value(program)


@linear_util.transformation2
def _rule(rule, *args):
    with jax.default_matmul_precision("highest"):
        return rule(*args)


@linear_util.transformation2
def _program(rule, *args):
    with jax.default_matmul_precision("highest"):
        jaxpr, *rest = rule(*args)
    # A derivative of second order has rules in the program of a rule.
    return _of_value(jaxpr), *rest


def _of_value(value: Any) -> Any:
    """A parameter of an equation: programs in it, others as they are."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        new = [_of_value(x) for x in value]
        changed = any(a is not b for a, b in zip(new, value, strict=True))
        return type(value)(new) if changed else value
    if not isinstance(value, Jaxpr | ClosedJaxpr):
        return value
    # From JAX 0.12 on both are one class.
    if isinstance(value, ClosedJaxpr) and value.jaxpr is not value:
        jaxpr = _of_value(value.jaxpr)
        return value if jaxpr is value.jaxpr else ClosedJaxpr(jaxpr, value.consts)
    jaxpr: Any = value
    equations = [_of_equation(equation) for equation in jaxpr.eqns]
    changed = any(a is not b for a, b in zip(equations, jaxpr.eqns, strict=True))
    return jaxpr.replace(eqns=equations) if changed else jaxpr


def _of_equation(equation: Any) -> Any:
    params = {name: _of_value(value) for name, value in equation.params.items()}
    for names, wrap in ((_PROGRAMS, _program), (_RULES, _rule)):
        params.update({name: wrap(params[name]) for name in names if name in params})
    changed = any(params[name] is not value for name, value in equation.params.items())
    return equation.replace(params=params) if changed else equation


@contextlib.contextmanager
def concrete_double_precision() -> Iterator[None]:
    """Numbers are computed at once, also while a program is traced, and in float64."""
    enable = getattr(jax, "enable_x64", None)
    if enable is None:  # JAX before 0.8
        enable = jax.experimental.enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    with jax.ensure_compile_time_eval(), enable(True):
        yield
