"""Is a function of a vector elementwise? Read off the program of its tangent."""

from collections.abc import Callable

import jax
from jax.extend.core import Jaxpr, Literal, Var
from jaxtyping import Array

# Linear functions of a tangent that keep each number at its place, by the names of JAX. Rules of
# differentiation turn all elementwise functions into these.
LINEAR = {
    "mul", "div", "neg", "add", "sub", "add_any", "select_n", "convert_element_type", "copy",
}  # fmt: skip
CALLS = {"jit", "pjit", "closed_call", "checkpoint", "remat2"}


def is_elementwise(f: Callable[[Array], Array], like: Array) -> bool:
    """Whether `f` is known to have a diagonal Jacobian at all arrays such as `like`.

    Traces it, and computes nothing.
    """
    shape = jax.ShapeDtypeStruct(like.shape, like.dtype)

    def tangent(u, v):
        return jax.jvp(f, (u,), (v,))[1]

    program = jax.make_jaxpr(tangent)(shape, shape).jaxpr
    return _dependent(program, {program.invars[1]}) is not None


def _dependent(program: Jaxpr, dependent: set[Var]) -> list[bool] | None:
    """Which results depend on the variables `dependent`. None if numbers change their place."""

    def shape(var):
        return var.aval.shape

    shapes = set(map(shape, dependent))
    for equation in program.eqns:
        flags = [not isinstance(x, Literal) and x in dependent for x in equation.invars]
        if not any(flags):
            continue
        outputs: list[bool] | None = [True] * len(equation.outvars)
        if equation.primitive.name in CALLS:
            inner = equation.params["jaxpr"]
            inner = getattr(inner, "jaxpr", inner)
            pairs = zip(inner.invars, flags, strict=True)
            outputs = _dependent(inner, {var for var, flag in pairs if flag})
        elif equation.primitive.name not in LINEAR:
            return None
        if outputs is None or any(shape(out) not in shapes for out in equation.outvars):
            return None
        dependent |= {var for var, flag in zip(equation.outvars, outputs, strict=True) if flag}
    return [not isinstance(x, Literal) and x in dependent for x in program.outvars]
