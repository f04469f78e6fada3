"""The settings of the loop."""

import dataclasses
from typing import Any

import equinox as eqx

from jaxode._jax.sharding import AxisName
from jaxode.ode.loop.step_size import Controller


class Stepper(eqx.Module):
    """A method, with error control or a number of equal steps."""

    method: Any = eqx.field(static=True)
    """A `Method`."""
    controller: Controller
    steps: int | None = eqx.field(static=True, default=None)
    """The number of equal steps, or None."""
    dense: bool = eqx.field(static=True, default=False)
    """Whether to keep all accepted steps, so that the solution is known between the ends."""
    precision: str | None = eqx.field(static=True, default=None)
    """The precision of matrix products in the vector field."""
    throw: bool = eqx.field(static=True, default=False)
    """Whether a failed backward solve raises."""
    stop: Any = None
    """The `Crossing` that may end a row."""

    @property
    def axis_name(self) -> AxisName | None:
        """The device axes over which the state is split."""
        return self.controller.axis_name

    @property
    def most_steps(self) -> int:
        """The largest number of accepted steps."""
        return self.controller.max_steps if self.steps is None else self.steps

    def controlled(self, **changed: Any) -> "Stepper":
        """Change settings of the controller."""
        controller = dataclasses.replace(self.controller, **changed)
        return dataclasses.replace(self, controller=controller)
