"""`jax.vjp`, with faster gradients of weights on a CPU."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxode._jax.primitives import kept_apart


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The value at `primals` and the pullback, like `jax.vjp`.

    The gradient of a weight is a product `ct^T x` that sums over the batch. XLA folds the transpose
    into the product, and its CPU library does not handle products that sum over the rows of the
    first factor. Keeping the transpose separate takes 0.4x to 0.9x the time for 64 to 860 units
    (benchmarks/NOTES.md). The numbers agree up to rounding. Programs for other platforms are the
    same as with `jax.vjp`.
    """
    value, pull = jax.vjp(function, *primals)

    def pull_apart(cotangent):
        closed, shape = jax.make_jaxpr(pull, return_shape=True)(cotangent)
        out = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(cotangent))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return value, pull_apart


def pulled_back(f: Callable[..., Any], params: Any, t: Any, y: Any, bar: Any, timed: bool):
    """`f(params, t, y)`, and the cotangents of `params`, `t` and `y`; that of `t` if `timed`."""
    if timed:
        value, pull = vjp(f, params, t, y)
        return value, *pull(bar)
    value, pull = vjp(lambda params, y: f(params, t, y), params, y)
    params_bar, y_bar = pull(bar)
    return value, params_bar, None, y_bar


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """`jax.core.eval_jaxpr`, with a copy of the transpose in every product of a transpose that sums
    over its columns."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    transposed = set()

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, [read(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr")
        if name in ("jit", "pjit") and isinstance(inner, ClosedJaxpr):
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        else:
            if name == "transpose":
                transposed.add(equation.outvars[0])
            elif name == "dot_general" and equation.invars[0] in transposed:
                (contracted, _), (batched, _) = equation.params["dimension_numbers"]
                if contracted == (1,) and not batched:
                    inputs[0] = kept_apart(inputs[0])
            bound = equation.primitive.get_bind_params(equation.params)
            functions, params = bound if isinstance(bound, tuple) else ([], bound)
            outputs = equation.primitive.bind(*functions, *inputs, **params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
