"""A function with a rule of its own under `jax.vmap`.

`jax.custom_batching.custom_vmap` also replaces the rule of derivatives, and computes tangents by
all inputs. Here a derivative is that of the function.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.core
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

T = TypeVar("T")

# (axis size, which leaves are mapped, *args) -> out. Mapped leaves have a leading axis, and so have
# those of out, except the ones that do not depend on them.
Rule = Callable[..., PyTree]


def with_vmap_rule(f: Callable[..., T], rule: Rule, *args: PyTree) -> T:
    """`f(*args)`, which `rule` computes under `jax.vmap`. All leaves of `args` are arrays.

    A function that does something beside its outputs, such as a callback or an exchange between
    mapped rows, has no rule.
    """
    leaves, structure = jax.tree.flatten(args)

    def flat(*leaves):
        return f(*structure.unflatten(leaves))

    program, shape = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    if program.effects:
        return f(*args)

    def of_leaves(size: int, mapped: list[bool], leaves: list[Any]) -> list[Any]:
        return jax.tree.leaves(
            rule(size, structure.unflatten(mapped), *structure.unflatten(leaves))
        )

    out = _call.bind(*leaves, program=program, rule=of_leaves)
    return jax.tree.unflatten(jax.tree.structure(shape), out)


def plain(f: Callable[..., T], mapped: tuple[PyTree, ...], *args: PyTree) -> T:
    """Apply `jax.vmap` without a rule."""
    axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, mapped)
    return jax.vmap(f, axes)(*args)


def one_by_one(f: Callable[..., T], mapped: tuple[PyTree, ...], *args: PyTree) -> T:
    """Run one problem after the other, in a loop."""
    mapped_args, shared = eqx.partition(args, mapped)
    return jax.lax.map(lambda one: f(*eqx.combine(one, shared)), mapped_args)


_call = Primitive("with_vmap_rule")
_call.multiple_results = True


@_call.def_impl
def _run(*leaves, program, rule):
    del rule
    return jaxpr_as_fun(program)(*leaves)


def _jvp(primals, tangents, *, program, rule):
    del rule
    dots = [None if isinstance(tangent, ad.Zero) else tangent for tangent in tangents]
    moved, still = eqx.partition(list(primals), [dot is not None for dot in dots])

    def of_moved(moved):
        return jaxpr_as_fun(program)(*eqx.combine(moved, still))

    out, dots = jax.jvp(of_moved, (moved,), (dots,))

    def zero(dot):
        return ad.Zero(jax.typeof(dot)) if dot.dtype == jax.dtypes.float0 else dot

    return out, list(map(zero, dots))


def _batched(leaves, axes, *, program, rule):
    mapped = [axis is not None for axis in axes]
    (size,) = {x.shape[axis] for x, axis in zip(leaves, axes, strict=True) if axis is not None}

    def to_front(x, axis):
        return x if axis is None else jax.numpy.moveaxis(x, axis, 0)

    out = rule(size, mapped, list(map(to_front, leaves, axes)))
    same = (x.shape == aval.shape for x, aval in zip(out, program.out_avals, strict=True))
    return out, [None if is_same else 0 for is_same in same]


_call.def_abstract_eval(lambda *_, program, rule: program.out_avals)
ad.primitive_jvps[_call] = _jvp
batching.primitive_batchers[_call] = _batched
mlir.register_lowering(_call, mlir.lower_fun(_run, multiple_results=True))
# Since JAX 0.11, a program with types of JAX's higher level is replaced by one without, once all
# transformations are done. As in JAX's own `custom_vmap`, the program then stands for the call.
_call.to_lojax = _run
