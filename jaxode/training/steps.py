"""The steps of a training, as one program for a block of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxode._jax.closure import compiled
from jaxode._jax.sharding import mean_over, of_device, over_devices, vary
from jaxode.training.devices import Devices
from jaxode.training.sources import Rows

MIN_AVERAGE_WEIGHT = 0.002  # of a step in the moving average of the parameters
STEPS_PER_BLOCK = 50  # whose rows are read at once


class Phase(NamedTuple):
    """A loss, and how to minimize it."""

    name: str
    loss: Callable[..., Float[Array, ""]]
    """A function of parameters, data, context and a key."""
    optimizer: Any
    key: PRNGKeyArray
    warm_up: int = 1
    """Steps in which the updates grow to their size."""
    as_vector: bool = False
    """Whether the optimizer may get all parameters as one vector. That compiles in less time."""


class TrainingState(NamedTuple):
    """The state of the optimization."""

    arrays: PyTree
    """The floating arrays of the parameters, or one vector of them."""
    average: PyTree
    optimizer: Any
    count: Int[Array, ""]


def unchanged(tree: PyTree) -> PyTree:
    return tree


class Program(NamedTuple):
    """The static part of a training step."""

    loss: Callable[..., Float[Array, ""]]
    optimizer: Any
    batch_size: int
    static: PyTree
    """The parameters but for their floating arrays."""
    unravel: Callable[[Any], PyTree]
    """Makes floating arrays of the parameters of the optimizer."""
    devices: Devices = Devices()
    in_order: bool = False
    """Whether steps take the rows of a block one after the other, or draw them."""


@compiled
def advance(program: Program, state: TrainingState, rates, rows: Rows, key, steps):
    """Take the steps from one number to another, each with its own key. Returns the state after."""
    take = functools.partial(_take_steps, program)
    # Each of several processes has rows of its own.
    split = (2,) if program.devices.several_processes else ()
    return over_devices(take, program.devices.mesh, split)(state, rates, rows, key, steps)


def _rows_of_step(program: Program, axes, rows: Rows, i, key):
    """The numbers of the rows that this device uses in step `i`."""
    if program.in_order:
        # Less than a batch, if the device has rows of its own.
        count = len(rows.x) // STEPS_PER_BLOCK
        drawn = i * count + jnp.arange(count)
    else:
        count = program.batch_size
        drawn = jax.random.randint(key, (count,), 0, len(rows.x))
    return of_device(drawn, axes) if count == program.batch_size else drawn


def _take_steps(program: Program, axes, state: TrainingState, rates, rows: Rows, key, steps):
    """The steps of a device: of its part of each batch, and of all parameters."""
    import optax  # `import jaxode` does not load it

    update = optax.with_extra_args_support(program.optimizer).update
    rate, warm_up = rates  # the part of an update that is made, and the steps of the warm-up

    def step(i, state):
        row_key, step_key = jax.random.split(jax.random.fold_in(key, i))
        part = _rows_of_step(program, axes, rows, i, row_key)
        x, context = jax.tree.map(lambda leaf: leaf[part], rows)

        def params(arrays):
            return eqx.combine(arrays, program.static)

        def of_part(arrays):
            return program.loss(params(arrays), x, context, step_key)

        # Made to vary, so that devices exchange their gradients at the end, and once.
        arrays = vary(program.unravel(state.arrays), frozenset(axes))
        value, gradient = jax.value_and_grad(of_part)(arrays)
        if program.unravel is not unchanged:
            gradient, _ = ravel_pytree(gradient)
        value, gradient = mean_over((value, gradient), axes)

        def of_arrays(arrays):
            return mean_over(of_part(arrays), axes)

        of_loss = {"value": value, "grad": gradient, "value_fn": of_arrays}
        ascent = jax.tree.map(jnp.conj, gradient)  # that of a complex parameter
        updates, inner = update(ascent, state.optimizer, state.arrays, **of_loss)
        rate_of_step = rate * jnp.minimum(1.0, (state.count + 1) / warm_up)
        arrays = jax.tree.map(
            lambda a, u: a + rate_of_step.astype(a.dtype) * u, state.arrays, updates
        )
        # The mean of the last tenth of the steps, at most of the last 500.
        weight = jnp.maximum(MIN_AVERAGE_WEIGHT, 10 / (10 + state.count))

        def mean(a, b):
            return a + (b.astype(a.dtype) - a) * weight.astype(a.dtype)

        average = jax.tree.map(mean, state.average, arrays)
        return TrainingState(arrays, average, inner, state.count + 1)

    first, last = steps
    return jax.lax.fori_loop(first, last, step, state)
