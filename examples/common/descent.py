"""Training by gradient descent, for the examples that have a loss of their own."""

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from rich.progress import Progress

BLOCK = 20  # steps in one compiled loop


def minimize(
    loss: Callable[[Any, Array, PRNGKeyArray], Float[Array, ""]],
    params: PyTree,
    optimizer: optax.GradientTransformation,
    steps: int,
    key: PRNGKeyArray,
    name: str,
) -> tuple[Any, Float[np.ndarray, " steps"]]:
    """Descend `loss(params, step, key)`, with another key in each step.

    Returns the parameters and the losses. `FloatingPointError` if a loss is not finite.
    """
    arrays, static = eqx.partition(params, eqx.is_inexact_array)

    @jax.jit
    def block(carry, each):
        def step(carry, each):
            arrays, state = carry
            of_arrays = lambda arrays: loss(eqx.combine(arrays, static), *each)
            value, gradient = jax.value_and_grad(of_arrays)(arrays)
            updates, state = optimizer.update(gradient, state, arrays)
            return (optax.apply_updates(arrays, updates), state), value

        return jax.lax.scan(step, carry, each)

    begin = time.perf_counter()
    carry, losses = (arrays, optimizer.init(arrays)), np.zeros(0)
    keys = jax.random.split(key, steps)
    with Progress() as progress:
        task = progress.add_task(f"{name}: compiling", total=steps)
        for done in range(0, steps, BLOCK):
            part = slice(done, done + BLOCK)
            carry, values = block(carry, (jnp.arange(steps)[part], keys[part]))
            losses = np.concatenate([losses, values])
            if not np.isfinite(values).all():
                step = np.flatnonzero(~np.isfinite(losses))[0]
                raise FloatingPointError(
                    f"{name}: the loss is not finite in step {step}. Lower the learning rate"
                )
            text = f"{name}: loss {losses[-1]:.3g}"
            progress.update(task, completed=len(losses), description=text)
    print(f"{name}: {steps} steps in {time.perf_counter() - begin:.0f} s", flush=True)
    return eqx.combine(carry[0], static), losses
