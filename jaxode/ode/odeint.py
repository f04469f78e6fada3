"""A drop-in replacement for `jax.experimental.ode.odeint`."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import check_state, is_list_of_numbers, numeric_dtype
from jaxode._checks.caller import public
from jaxode._checks.rules import forwards, is_known
from jaxode.ode.adjoints import BacksolveAdjoint
from jaxode.ode.field import call_field
from jaxode.ode.options import NO_LIMIT, SolveOptions
from jaxode.ode.solve import UserField, solve_checked
from jaxode.ode.system import OnTheWay


class _StateFirst(UserField):
    """`func(y, t, *args)`."""

    name: ClassVar[str] = "func"
    call: ClassVar[str] = "(y, t, *args)"

    def __call__(self, t, y, shared, row):
        def f(t, y, args):
            return _as_state(y, self.f(y, t, *args))

        return call_field(f, t, y, shared, self.name, call=self.call, row=row)


def _as_state(y: PyTree[Array], dy: PyTree) -> PyTree:
    """`dy` in the structure of `y`. As in the original, it may hold its numbers in another one."""
    (leaves, structure), slopes = jax.tree.flatten(y), jax.tree.leaves(dy)
    sizes = [x.size for x in leaves]
    if jax.tree.structure(dy) == structure or sum(map(np.size, slopes)) != sum(sizes):
        return dy
    blocks = jnp.split(jnp.concatenate(list(map(jnp.ravel, slopes))), np.cumsum(sizes)[:-1])
    return structure.unflatten(
        [x.reshape(like.shape) for x, like in zip(blocks, leaves, strict=True)]
    )


@public("odeint")
def odeint(
    func: Callable[..., PyTree],
    y0: PyTree[Float[Array, "..."]],
    t: Float[Array, " times"],
    *args: Any,
    rtol: float = 1.4e-8,
    atol: float = 1.4e-8,
    mxstep: float = jnp.inf,
    hmax: float = jnp.inf,
) -> PyTree[Float[Array, "times ..."]]:
    """Solve `dy/dt = func(y, t, *args)`, `y(t[0]) = y0`, at the times `t`.

    Differences from the original: the solver is Tsit5 instead of Dormand-Prince, a failed solve
    returns NaN instead of an unfinished result, the error norm of the gradient leaves out the
    parameters, states are real (pass real and imaginary parts), and `mxstep` is a mean over the
    intervals of `t`. Use `jaxode.solve` for errors that say what failed, and for other gradients.

    Args:
        func: time derivative of `y` at time `t`, with the structure and shapes of `y0`, or the same
            numbers in another structure, such as a list of them.
        y0: initial state, any pytree of floating arrays.
        t: times, `[times]`, monotone; `t[0]` is the start.
        *args: more arguments of `func`.
        rtol: relative error tolerance per step.
        atol: absolute error tolerance per step.
        mxstep: steps allowed between two times, on average.
        hmax: maximum step size.

    Returns:
        `y` at the times `t`: leaves `[times, ...]`. NaN if the solve fails.

    Raises:
        TypeError, ValueError: at trace time, for arguments of the wrong kind.

    Differentiation: in reverse mode, any number of times, with respect to `y0`, `t`, `args` and
    values that `func` closes over, by the adjoint ODE (`jaxode.BacksolveAdjoint`). For forward
    mode, use `jaxode.solve`.
    """
    dtype = numeric_dtype(t)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = repr(t) if dtype is None else dtype
        raise TypeError(f"odeint(t=...): must be an array of floats; got {got}.")
    if jnp.ndim(t) != 1 or len(t) == 0:
        raise ValueError(f"odeint(t=...): must be a vector of times; got shape {jnp.shape(t)}.")
    times: Any = t
    if is_known(t):
        times = np.asarray(t)  # a JAX array may have lost times that NumPy holds
        if not (np.isfinite(times).all() and forwards(times[0], times[-1], times).all()):
            raise ValueError(
                f"odeint(t=...): times must be finite, and increase or decrease; got {t}."
            )
    for name, value in (("mxstep", mxstep), ("hmax", hmax)):
        if not is_known(value) or not value > 0:
            raise ValueError(f"odeint({name}=...): must be a positive number; got {value}.")
    steps = int(min(mxstep * max(len(t) - 1, 1), NO_LIMIT))
    if steps < 1:
        raise ValueError(f"odeint(mxstep=...): must allow at least one step; got {mxstep}.")
    max_step = None if hmax == jnp.inf else hmax
    options = SolveOptions.make(
        rtol=rtol, atol=atol, max_steps=steps, max_step=max_step,
        adjoint=BacksolveAdjoint(),
    )  # fmt: skip
    if is_list_of_numbers(y0):
        y0 = jax.tree.map(jnp.asarray, y0)
    y0, span = check_state("y0", y0), (times[0], times[-1])
    return solve_checked(
        func, y0, span, args, options, OnTheWay(ts=times), kind=_StateFirst, throw=False
    ).ys
