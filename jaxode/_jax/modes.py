"""Every mode and order of differentiation for a function with a reverse sweep of its own.

`F(v)` runs forward, and `G(v, w) = F'(v)^T w` is its sweep. JAX differentiates both in forward
mode, loops of unknown length included. No more is needed:

    tangent of F                F'(v) dv                     = jvp(F, v, dv)
    transpose of the tangent    w -> F'(v)^T w               = G(v, w)
    sweep of G                  u -> grad_(v, w) <u, G>      = jvp(v -> (G(v, w), F(v)), v, u)
    sweep of the tangent        w -> grad_(v, dv) <w, F' dv> = (jvp(v -> G(v, w), v, dv), G(v, w))

The third line holds because the Hessian of `<w, F>` is symmetric. So a function with a sweep makes
its sweep and its tangent such functions, too, and all orders follow without reverse mode of a loop.
What a run records serves the first sweep alone. Under `jax.grad` no tangent is computed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.core import no_axis_name

# Unlike `batching.primitive_batchers`, these are told the name of the mapped axis.
from jax._src.interpreters.batching import fancy_primitive_batchers
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, mlir
from jaxtyping import Array, PyTree

Arrays = list[Array]
PyTreeDef = Any
Flags = tuple[bool, ...]


class WithSweep(NamedTuple):
    """A function of arrays, and its sweep. Made by `with_sweep`.

    `perturbed` flags the inputs that are differentiated, `touched` the outputs with cotangents. A
    tangent or a sweep, as a function of this kind, has no record.
    """

    value: Callable[[Arrays], Arrays]
    """The outputs that have derivatives."""
    sweep: Callable[[Flags, Flags, Arrays, Arrays], Arrays]
    """`(perturbed, touched, inputs, bars)` -> the cotangents of the inputs that are perturbed."""
    record: Callable[[Flags, Arrays], tuple[PyTree, PyTree, PyTree]] | None = None
    """`(perturbed, inputs)` -> outputs, other outputs, and what the first sweep reads."""
    recorded_sweep: Callable[[Flags, Flags, Arrays, PyTree, Arrays], Arrays] | None = None
    """`(perturbed, touched, inputs, record, bars)` -> what `sweep` returns."""

    def sweep_and_value(self, perturbed: Flags, touched: Flags, inputs: Arrays, bars: Arrays):
        """`sweep` and `value`, from a single run if there is a record."""
        if self.record is None or self.recorded_sweep is None:
            return self.sweep(perturbed, touched, inputs, bars), self.value(inputs)
        outputs, _, record = self.record(perturbed, inputs)
        swept = self.recorded_sweep(perturbed, touched, inputs, record, bars)
        return swept, jax.tree.leaves(outputs)

    def tangent(self, perturbed: Flags) -> "WithSweep":
        """`(inputs, tangents of those that are perturbed)` -> the tangents of the outputs."""
        count = len(perturbed)

        def value(both: Arrays) -> Arrays:
            return _pushed(self.value, perturbed, both[:count], both[count:])

        def sweep(perturbed_again: Flags, touched: Flags, both: Arrays, bars: Arrays) -> Arrays:
            inputs, dots = both[:count], both[count:]
            of_dots = _scattered(perturbed, perturbed_again[count:], False)
            either = tuple(a or b for a, b in zip(perturbed_again[:count], of_dots, strict=True))

            def swept(inputs: Arrays) -> Arrays:
                return self.sweep(either, touched, inputs, bars)

            bars_of, dots_of = _value_and_pushed(swept, perturbed, inputs, dots)
            by_input = _chosen(perturbed_again[:count], _scattered(either, dots_of))
            return by_input + _chosen(of_dots, _scattered(either, bars_of))

        return WithSweep(value, sweep)

    def of_sweep(self, perturbed: Flags, touched: Flags) -> "WithSweep":
        """`(inputs, bars of the outputs that are touched)` -> the cotangents of `sweep`."""
        count = len(perturbed)

        def value(both: Arrays) -> Arrays:
            return self.sweep(perturbed, touched, both[:count], both[count:])

        def sweep(
            perturbed_again: Flags, touched_again: Flags, both: Arrays, bars_again: Arrays
        ) -> Arrays:
            inputs, bars = both[:count], both[count:]
            along = _scattered(perturbed, touched_again, False)
            of_inputs, of_bars = (
                perturbed_again[:count],
                _scattered(touched, perturbed_again[count:], False),
            )

            def swept(inputs: Arrays) -> tuple[Arrays, Arrays]:
                if not any(of_inputs):
                    return [], self.value(inputs)
                if not any(of_bars):
                    return self.sweep(of_inputs, touched, inputs, bars), []
                return self.sweep_and_value(of_inputs, touched, inputs, bars)

            by_input, outputs = _pushed(swept, along, inputs, bars_again)
            return by_input + (_chosen(of_bars, outputs) if any(of_bars) else [])

        return WithSweep(value, sweep)

    def mapped(self, axes: list[int | None], over: Any = None) -> "WithSweep":
        """The same for several inputs, as `jax.vmap`. Shared inputs get summed cotangents."""
        vmap = functools.partial(jax.vmap, **_named(over))

        def value(inputs: Arrays) -> Arrays:
            return vmap(self.value, (axes,))(inputs)

        def summed(perturbed: Flags, bars: Arrays) -> Arrays:
            shared = [axis is None for axis in _chosen(perturbed, axes)]
            return [bar.sum(0) if one else bar for bar, one in zip(bars, shared, strict=True)]

        def sweep(perturbed: Flags, touched: Flags, inputs: Arrays, bars: Arrays) -> Arrays:
            def one(inputs, bars):
                return self.sweep(perturbed, touched, inputs, bars)

            return summed(perturbed, vmap(one, (axes, 0))(inputs, bars))

        if self.record is None or self.recorded_sweep is None:
            return WithSweep(value, sweep)
        of_one, sweep_of_one = self.record, self.recorded_sweep

        def record(perturbed: Flags, inputs: Arrays):
            return vmap(lambda inputs: of_one(perturbed, inputs), (axes,))(inputs)

        def recorded_sweep(
            perturbed: Flags, touched: Flags, inputs: Arrays, record: PyTree, bars: Arrays
        ):
            def one(inputs, record, bars):
                return sweep_of_one(perturbed, touched, inputs, record, bars)

            return summed(perturbed, vmap(one, (axes, 0, 0))(inputs, record, bars))

        return WithSweep(value, sweep, record, recorded_sweep)


def with_sweep(
    run: Callable[[Arrays], tuple[PyTree, PyTree]],
    record: Callable[[Flags, Arrays], tuple[PyTree, PyTree, PyTree]],
    recorded_sweep: Callable[[Flags, Flags, Arrays, PyTree, Arrays], Arrays],
) -> WithSweep:
    """The function `run(inputs)`, without its other outputs. Arguments as in `WithSweep`.

    None of them may hold traced values, which would outlive their trace.
    """

    def value(inputs: Arrays) -> Arrays:
        return jax.tree.leaves(run(inputs)[0])

    def sweep(perturbed: Flags, touched: Flags, inputs: Arrays, bars: Arrays) -> Arrays:
        *_, recorded = record(perturbed, inputs)
        return recorded_sweep(perturbed, touched, inputs, recorded, bars)

    return WithSweep(value, sweep, record, recorded_sweep)


def differentiable(
    function: WithSweep, run: Callable[[Arrays], tuple[PyTree, PyTree]], inputs: Arrays
) -> tuple[PyTree, PyTree]:
    """`run(inputs)`: outputs whose derivatives are those of `function`, and others without any."""
    program, shape = jax.make_jaxpr(run, return_shape=True)(inputs)
    outputs = len(jax.tree.leaves(shape[0]))
    out = _bind_value(program, function, inputs, len(inputs), outputs)
    return jax.tree.structure(shape).unflatten(out)


def sweep_of(
    function: WithSweep,
    perturbed: Flags,
    touched: Flags,
    inputs: Arrays,
    record: PyTree,
    bars: Arrays,
    lanes: int = 0,
) -> Arrays:
    """The cotangents of the inputs that are perturbed, with all their derivatives.

    `bars` and the results may have leading axes, `lanes`.
    """
    count, middle = len(perturbed), len(perturbed) + len(bars)
    back, recorded_sweep = function.of_sweep(perturbed, touched), function.recorded_sweep
    of_record, structure = jax.tree.flatten(record)

    def swept(inputs: Arrays, record: PyTree, bars: Arrays) -> Arrays:
        if recorded_sweep is None or record is None:
            return function.sweep(perturbed, touched, inputs, bars)
        return recorded_sweep(perturbed, touched, inputs, record, bars)

    for _ in range(lanes):
        back = back.mapped([None] * count + [0] * len(bars))
        swept = jax.vmap(swept, (None, None, 0))

    def flat(*leaves):
        record = structure.unflatten(leaves[middle:])
        return swept([*leaves[:count]], record, [*leaves[count:middle]])

    leaves = *inputs, *bars, *of_record
    program = jax.make_jaxpr(flat)(*leaves)
    return _bind_value(program, back, leaves, middle, len(program.out_avals))


def _named(over: Any) -> dict[str, Any]:
    """The options of `jax.vmap` for what JAX says of a mapped axis."""
    if over is None:
        return {}
    name = None if over.name is no_axis_name else over.name
    return {"axis_size": over.size, "axis_name": name, "spmd_axis_name": over.spmd_name}


def _chosen(flags: Flags, values: list[Any]) -> list[Any]:
    """Values whose flag is set."""
    return [value for flag, value in zip(flags, values, strict=True) if flag]


def _scattered(flags: Flags, values: Any, otherwise: Any = None) -> Any:
    """The inverse of `_chosen`: `values` where a flag is set."""
    iterator = iter(values)
    return tuple(next(iterator) if flag else otherwise for flag in flags)


def _value_and_pushed(f: Callable[[Arrays], Any], perturbed: Flags, inputs: Arrays, dots: Arrays):
    """The values of `f`, and its tangents along those inputs that are perturbed."""

    def of_perturbed(some: Arrays) -> Arrays:
        at = _scattered(perturbed, some)
        return f([x if flag else old for flag, x, old in zip(perturbed, at, inputs, strict=True)])

    return jax.jvp(of_perturbed, (_chosen(perturbed, inputs),), (dots,))


def _pushed(f: Callable[[Arrays], Any], perturbed: Flags, inputs: Arrays, dots: Arrays) -> Any:
    return _value_and_pushed(f, perturbed, inputs, dots)[1]


def _is_still(dot: Any) -> bool:
    return isinstance(dot, ad.Zero) or dot.dtype == jax.dtypes.float0


def _tangent_type(x: Any) -> Any:
    return jax.typeof(x).to_tangent_aval()


# `program(*inputs, *record)`. Of what it returns, the outputs come first, and have the derivatives
# of `function`; the others have none.
_value = Primitive("with_sweep")
_value.multiple_results = True
# The tangents of the outputs, from the inputs, the record, and tangents of perturbed inputs. All
# tangents may have leading axes, `lanes`.
_linear = Primitive("tangent_with_sweep")
_linear.multiple_results = True


def _run(*leaves, program: ClosedJaxpr, **_):
    return jaxpr_as_fun(program)(*leaves)


def _split(leaves, perturbed: Flags, structure: PyTreeDef) -> tuple[Arrays, Arrays, Arrays]:
    """The inputs, the leaves of the record, and the tangents of what is perturbed."""
    count, end = len(perturbed), len(perturbed) + structure.num_leaves
    return [*leaves[:count]], [*leaves[count:end]], [*leaves[end:]]


def _run_linear(
    *leaves, function: WithSweep, perturbed: Flags, structure: PyTreeDef, lanes: int, **_
):
    inputs, _, dots = _split(leaves, perturbed, structure)

    def push(dots: Arrays) -> Arrays:
        return _pushed(function.value, perturbed, inputs, dots)

    for _ in range(lanes):
        push = jax.vmap(push)
    return push(dots)


def _bind_linear(
    function: WithSweep, perturbed: Flags, inputs, record, dots, types, lanes: int = 0
):
    leaves, structure = jax.tree.flatten(record)
    params = {"function": function, "perturbed": perturbed, "structure": structure}
    return _linear.bind(*inputs, *leaves, *dots, lanes=lanes, types=types, **params)


def _bind_value(program: ClosedJaxpr, function: WithSweep, leaves, inputs: int, outputs: int):
    return _value.bind(*leaves, program=program, function=function, inputs=inputs, outputs=outputs)


def _value_jvp(primals, tangents, *, program, function: WithSweep, inputs: int, outputs: int):
    at, perturbed = [*primals[:inputs]], tuple(not _is_still(dot) for dot in tangents[:inputs])
    record = None
    if function.record is not None and any(perturbed):
        out, record = _recorded(function, perturbed, at, outputs)
    else:
        out = _bind_value(program, function, primals, inputs, outputs)
    still = [ad.Zero(_tangent_type(x)) for x in out]
    if not any(perturbed):
        return out, still
    types = tuple(_tangent_type(x) for x in out[:outputs])
    dots = _bind_linear(
        function, perturbed, at, record, _chosen(perturbed, tangents[:inputs]), types
    )
    return out, dots + still[outputs:]


def _recorded(function: WithSweep, perturbed: Flags, inputs: Arrays, outputs: int):
    """All outputs, whose derivatives need no record, and the record, which has none."""
    record = function.record
    assert record is not None
    program, shape = jax.make_jaxpr(
        lambda *inputs: record(perturbed, [*inputs]), return_shape=True
    )(*inputs)
    again = function._replace(record=None, recorded_sweep=None)
    out = _bind_value(program, again, inputs, len(inputs), outputs)
    structure = jax.tree.structure(shape[2])
    number = len(out) - structure.num_leaves
    return out[:number], structure.unflatten(out[number:])


def _linear_jvp(
    leaves,
    tangents,
    *,
    function: WithSweep,
    perturbed: Flags,
    structure: PyTreeDef,
    lanes: int,
    types,
):
    inputs, _, dots = _split(leaves, perturbed, structure)
    params = {
        "function": function,
        "perturbed": perturbed,
        "structure": structure,
        "lanes": lanes,
        "types": types,
    }
    out = _linear.bind(*leaves, **params)
    of_inputs, _, of_dots = _split(tangents, perturbed, structure)
    along_inputs = tuple(not _is_still(dot) for dot in of_inputs)
    along_dots = tuple(not _is_still(dot) for dot in of_dots)
    if not any(along_inputs):
        if not any(along_dots):
            return out, [ad.Zero(_tangent_type(x)) for x in out]
        moves = map(ad.instantiate_zeros, of_dots)
        return out, _linear.bind(*leaves[: len(leaves) - len(dots)], *moves, **params)
    both = function.tangent(perturbed)
    for _ in range(lanes):
        both = both.mapped([None] * len(inputs) + [0] * len(dots))
    along = _chosen(along_inputs, of_inputs) + _chosen(along_dots, of_dots)
    where = along_inputs + along_dots
    return out, _bind_linear(
        both, where, [*inputs, *dots], None, along, tuple(map(_tangent_type, out))
    )


def _linear_transpose(
    bars, *leaves, function: WithSweep, perturbed: Flags, structure: PyTreeDef, lanes: int, types
):
    del types
    inputs, record, dots = _split(leaves, perturbed, structure)
    nothing = [None] * (len(leaves) - len(dots))
    touched = tuple(not _is_still(bar) for bar in bars)
    if not any(touched):
        return [
            *nothing,
            *(ad.Zero(dot.aval) if ad.is_undefined_primal(dot) else None for dot in dots),
        ]
    bars = _chosen(touched, bars)
    swept = sweep_of(function, perturbed, touched, inputs, structure.unflatten(record), bars, lanes)
    # A tangent that is zero, but not known to be, is no unknown of the transpose.
    by_dot = (
        bar if ad.is_undefined_primal(dot) else None for bar, dot in zip(swept, dots, strict=True)
    )
    return [*nothing, *by_dot]


def _batched(rule: Callable[..., Any], primitive: Primitive) -> Callable[..., Any]:
    """The rule, which is left out if neither values nor the name of the axis are mapped."""

    def of_any(over, leaves, axes, **params):
        if over.name is no_axis_name and all(axis is None for axis in axes):
            out = primitive.bind(*leaves, **params)
            return out, [None] * len(out)
        return rule(over, leaves, axes, **params)

    return of_any


def _to_front(leaves, axes):
    """Mapped leaves with their axis first, and which are mapped."""
    front = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(leaves, axes, strict=True)
    ]
    return front, [None if axis is None else 0 for axis in axes]


def _spread(x, axis, size: int):
    return jnp.broadcast_to(x, (size, *x.shape)) if axis is None else x


def _value_batched(over, leaves, axes, *, program, function: WithSweep, inputs: int, outputs: int):
    leaves, axes = _to_front(leaves, axes)
    program = jax.make_jaxpr(jax.vmap(jaxpr_as_fun(program), axes, **_named(over)))(*leaves)
    out = _bind_value(program, function.mapped(axes[:inputs], over), leaves, inputs, outputs)
    return out, [0] * len(out)


def _linear_batched(
    over,
    leaves,
    axes,
    *,
    function: WithSweep,
    perturbed: Flags,
    structure: PyTreeDef,
    lanes: int,
    types,
):
    size, named = over.size, over.name is not no_axis_name
    leaves, axes = _to_front(leaves, axes)
    inputs, record, dots = _split(leaves, perturbed, structure)
    of_inputs, of_record, of_dots = _split(axes, perturbed, structure)
    dots = [_spread(dot, axis, size) for dot, axis in zip(dots, of_dots, strict=True)]
    if not named and all(axis is None for axis in of_inputs + of_record):
        types = tuple(_with_axis(one, size, 0) for one in types)
        record = structure.unflatten(record)
        out = _bind_linear(function, perturbed, inputs, record, dots, types, lanes + 1)
        return out, [0] * len(out)
    wide = [
        None if axis is None and not flag else 0
        for axis, flag in zip(of_inputs, perturbed, strict=True)
    ]
    inputs = [
        x if new is None else _spread(x, axis, size)
        for x, axis, new in zip(inputs, of_inputs, wide, strict=True)
    ]
    record = [_spread(x, axis, size) for x, axis in zip(record, of_record, strict=True)]
    record = structure.unflatten(record)
    dots = [jnp.moveaxis(dot, 0, lanes) for dot in dots]
    types = tuple(_with_axis(one, size, lanes) for one in types)
    out = _bind_linear(function.mapped(wide, over), perturbed, inputs, record, dots, types, lanes)
    return out, [lanes] * len(out)


def _with_axis(like: Any, size: int, axis: int) -> Any:
    return like.update(shape=(*like.shape[:axis], size, *like.shape[axis:]))


_value.def_impl(_run)
_value.def_effectful_abstract_eval(lambda *_, program, **__: (program.out_avals, program.effects))
_linear.def_impl(_run_linear)
_linear.def_abstract_eval(lambda *_, types, **__: types)
ad.primitive_jvps[_value] = _value_jvp
ad.primitive_jvps[_linear] = _linear_jvp
ad.primitive_transposes[_linear] = _linear_transpose
for _primitive, _program, _rule in (
    (_value, _run, _value_batched),
    (_linear, _run_linear, _linear_batched),
):
    mlir.register_lowering(_primitive, mlir.lower_fun(_program, multiple_results=True))
    _primitive.to_lojax = _program  # as in `vmap_rule.py`
    fancy_primitive_batchers[_primitive] = _batched(_rule, _primitive)
