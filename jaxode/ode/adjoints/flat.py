"""A solve as a function of arrays, with the sweep of its gradient method (`_jax/modes.py`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxode._jax.modes import WithSweep, differentiable, sweep_of, with_sweep
from jaxode.ode.adjoints.vmap import Reverse
from jaxode.ode.loop.initial_value_problem import InitialValueProblem
from jaxode.ode.loop.integrate import Integration, integrate
from jaxode.ode.loop.stepper import Stepper

Flags = tuple[bool, ...]


class FlatSolve(NamedTuple):
    """A solve whose inputs and outputs are lists of arrays."""

    reverse: Callable[[InitialValueProblem], Reverse]
    """Flags of the leaves that are differentiated -> the way forward and back."""
    structure: Any
    """The structure of the inputs, `(problem, stepper)`."""

    def run(self, inputs: list[Array]) -> tuple[Integration, Integration]:
        """The solution in two parts: what has derivatives, and the rest."""
        integration = integrate(*self.structure.unflatten(inputs))[0]
        return eqx.partition(integration, with_derivatives(integration))

    def record(self, perturbed: Flags, inputs: list[Array]):
        """The parts of `run`, with what the sweep reads."""
        recorded = self._reverse(perturbed).forward(*self.structure.unflatten(inputs))
        return *eqx.partition(recorded[0], with_derivatives(recorded[0])), recorded

    def recorded_sweep(
        self,
        perturbed: Flags,
        touched: Flags,
        inputs: list[Array],
        recorded: Any,
        bars: list[Array],
    ) -> list[Array]:
        """The cotangents of perturbed inputs, from those of the outputs that are touched."""
        problem, stepper = self.structure.unflatten(inputs)
        outputs = jax.tree.structure(eqx.filter(recorded[0], with_derivatives(recorded[0])))
        next_bar, reverse = iter(bars), self._reverse(perturbed)
        bar = outputs.unflatten([next(next_bar) if flag else None for flag in touched])
        return pulled_leaves(
            reverse.perturbed, problem, reverse.backward(recorded, bar, problem, stepper)
        )

    def _reverse(self, perturbed: Flags) -> Reverse:
        return self.reverse(self.structure.unflatten(perturbed)[0])

    @property
    def function(self) -> WithSweep:
        """The solve, with its sweep."""
        return with_sweep(self.run, self.record, self.recorded_sweep)


def solution(
    reverse: Callable[[InitialValueProblem], Reverse],
    problem: InitialValueProblem,
    stepper: Stepper,
) -> Integration:
    """The solution, with every mode and order of differentiation."""
    inputs, structure = jax.tree.flatten((problem, stepper))
    flat = FlatSolve(reverse, structure)
    return eqx.combine(*differentiable(flat.function, flat.run, inputs))


def pulled_back(
    reverse: Callable[[InitialValueProblem], Reverse],
    problem: InitialValueProblem,
    stepper: Stepper,
    perturbed: InitialValueProblem,
    recorded: tuple[Integration, Any],
    bar: Integration,
) -> InitialValueProblem:
    """The cotangents of the problem, with every mode and order of differentiation."""
    inputs, structure = jax.tree.flatten((problem, stepper))
    unperturbed = (False for _ in jax.tree.leaves(stepper))
    flags = *map(bool, jax.tree.leaves(perturbed)), *unperturbed
    outputs = jax.tree.structure(eqx.filter(recorded[0], with_derivatives(recorded[0])))
    bars = outputs.flatten_up_to(eqx.filter(bar, with_derivatives(recorded[0])))
    touched = tuple(bar is not None for bar in bars)
    if not any(touched):
        return jax.tree.map(lambda _: None, problem)
    bars = [bar for bar in bars if bar is not None]
    function = FlatSolve(reverse, structure).function
    pulled = iter(sweep_of(function, flags, touched, inputs, recorded, bars))
    return jax.tree.map(lambda _, flag: next(pulled) if flag else None, problem, perturbed)


def undifferentiated(stepper: Stepper) -> Stepper:
    """The settings without derivatives."""
    return jax.tree.map(jax.lax.stop_gradient, stepper)


def with_derivatives(integration: Integration) -> Integration:
    """Flags of the results that have derivatives."""
    flags = jax.tree.map(lambda _: False, integration)
    steps = flags.trajectory
    if steps is not None:
        steps = steps._replace(times=True, y=True, k=True)
    ys = None if integration.ys is None else True
    return flags._replace(y1=True, ys=ys, trajectory=steps)


def pulled_leaves(perturbed: Any, inputs: Any, bars: Any) -> list[Array]:
    """The cotangents of the leaves that are `perturbed`. None in `bars` is zero."""
    flags, structure = jax.tree.flatten(perturbed)
    of_all = zip(structure.flatten_up_to(bars), jax.tree.leaves(inputs), flags, strict=True)
    pulled = [(jnp.zeros_like(x) if bar is None else bar, x) for bar, x, flag in of_all if flag]
    assert all((bar.shape, bar.dtype) == (x.shape, x.dtype) for bar, x in pulled)
    return [bar for bar, _ in pulled]
