"""A solve as a function of arrays, with the sweep of its gradient method (`_jax/modes.py`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxode._jax.modes import WithSweep, differentiable, sweep_of
from jaxode.ode.adjoints.vmap import Reverse
from jaxode.ode.loop.integrate import Integration, integrate
from jaxode.ode.loop.problem import Problem, Stepper

Flags = tuple[bool, ...]


class FlatSolve(NamedTuple):
    """A solve whose inputs and outputs are lists of arrays."""

    reverse: Callable[[Problem], Reverse]
    """Flags of the leaves that are differentiated -> the way forward and back."""
    inputs: list[Array]
    structure: Any
    """The structure of the inputs, `(problem, stepper)`."""
    traced: dict[str, Any]
    """The structures of the `outputs`, which have derivatives, of the `rest` and of the `record`:
    they are known once a solve was traced."""

    @classmethod
    def of(
        cls, reverse: Callable[[Problem], Reverse], problem: Problem, stepper: Stepper
    ) -> "FlatSolve":
        return cls(reverse, *jax.tree.flatten((problem, stepper)), {})

    def solution(self) -> Integration:
        """The solution, with every mode and order of differentiation."""
        outputs, rest = differentiable(self._function, self._solve, self.inputs)
        return eqx.combine(
            self.traced["outputs"].unflatten(outputs), self.traced["rest"].unflatten(rest)
        )

    def pulled_back(
        self, wanted: Problem, recorded: tuple[Integration, Any], bar: Integration
    ) -> Problem:
        """The cotangents of the problem, with every mode and order of differentiation."""
        problem, stepper = self.structure.unflatten(self.inputs)
        moved = *map(bool, jax.tree.leaves(wanted)), *(False for _ in jax.tree.leaves(stepper))
        self._split(recorded[0])
        record = self._flat_record(recorded)
        bars = self.traced["outputs"].flatten_up_to(eqx.filter(bar, with_derivatives(recorded[0])))
        touched = tuple(bar is not None for bar in bars)
        if not any(touched):
            return jax.tree.map(lambda _: None, problem)
        bars = [bar for bar in bars if bar is not None]
        pulled = iter(sweep_of(self._function, moved, touched, self.inputs, record, bars))
        return jax.tree.map(lambda _, flag: next(pulled) if flag else None, problem, wanted)

    @property
    def _function(self) -> WithSweep:
        def value(inputs: list[Array]) -> list[Array]:
            return self._solve(inputs)[0]

        return WithSweep(value, self._sweep, self._record, self._recorded_sweep)

    def _solve(self, inputs: list[Array]) -> tuple[list[Array], list[Array]]:
        return self._split(integrate(*self.structure.unflatten(inputs))[0])

    def _split(self, integration: Integration) -> tuple[list[Array], list[Array]]:
        outputs, rest = eqx.partition(integration, with_derivatives(integration))
        outputs, self.traced["outputs"] = jax.tree.flatten(outputs)
        rest, self.traced["rest"] = jax.tree.flatten(rest)
        return outputs, rest

    def _flat_record(self, recorded: tuple[Integration, Any]) -> list[Array]:
        record, self.traced["record"] = jax.tree.flatten(recorded)
        return record

    def _reverse(self, moved: Flags) -> Reverse:
        return self.reverse(self.structure.unflatten(moved)[0])

    def _record(self, moved: Flags, inputs: list[Array]):
        recorded = self._reverse(moved).forward(*self.structure.unflatten(inputs))
        return *self._split(recorded[0]), self._flat_record(recorded)

    def _sweep(self, moved: Flags, touched: Flags, inputs: list[Array], bars: list[Array]):
        *_, record = self._record(moved, inputs)
        return self._recorded_sweep(moved, touched, inputs, record, bars)

    def _recorded_sweep(
        self,
        moved: Flags,
        touched: Flags,
        inputs: list[Array],
        record: list[Array],
        bars: list[Array],
    ) -> list[Array]:
        problem, stepper = self.structure.unflatten(inputs)
        recorded, reverse = self.traced["record"].unflatten(record), self._reverse(moved)
        rest = iter(bars)
        bar = self.traced["outputs"].unflatten([next(rest) if flag else None for flag in touched])
        return pulled_leaves(
            reverse.wanted, problem, reverse.backward(recorded, bar, problem, stepper)
        )


def undifferentiated(stepper: Stepper) -> Stepper:
    """The settings, by which nothing is differentiated."""
    return jax.tree.map(jax.lax.stop_gradient, stepper)


def with_derivatives(integration: Integration) -> Integration:
    """Flags of the results that have derivatives."""
    flags = jax.tree.map(lambda _: False, integration)
    steps = flags.trajectory
    if steps is not None:
        steps = steps._replace(times=True, y=True, k=True)
    ys = None if integration.ys is None else True
    return flags._replace(y1=True, ys=ys, trajectory=steps)


def pulled_leaves(wanted: Any, inputs: Any, bars: Any) -> list[Array]:
    """The cotangents of the leaves that are `wanted`. None in `bars` is zero."""
    flags, structure = jax.tree.flatten(wanted)
    of_all = zip(structure.flatten_up_to(bars), jax.tree.leaves(inputs), flags, strict=True)
    return [jnp.zeros_like(x) if bar is None else bar for bar, x, flag in of_all if flag]
