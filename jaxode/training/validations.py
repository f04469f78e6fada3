"""Validations of a training: the best parameters, and whether it gets worse or has exploded."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxode._jax.closure import compiled
from jaxode._jax.sharding import mean_over, over_devices
from jaxode.density.density import Density
from jaxode.divergence import Divergence
from jaxode.flows.cnf import CNF
from jaxode.training.devices import Devices
from jaxode.training.sources import Rows

# Training ends early after so many validations in a row that are so much worse than the best. Those
# of the first steps do not count.
PATIENCE_VALIDATIONS = 5
WORSE_NATS = 0.02
UNCOUNTED_STEPS = 1000
# Training has exploded if a validation is worse by the larger of both.
EXPLOSION_NATS = 100.0
EXPLOSION_NATS_PER_COLUMN = 10.0
MAX_EXACT_DIMENSIONS = 16  # up to which validations take the exact trace
VALIDATION_TOLERANCE = 1e-3  # validations are solved at this, or at the flow's if that is looser


class Point(NamedTuple):
    """The parameters, evaluated on the validation rows."""

    phase: str
    step: int
    seconds: float
    """Since the call, with compilation."""
    nats: float
    """Mean negative log-density of the validation rows, in the units of the data.

    At a tolerance of 1e-3, or that of the flow if it is looser. In more than 16 dimensions with one
    probe of the divergence, unless the flow takes a closed form or an exact divergence of your own:
    `exact()` is estimated there, too.
    """


class Verdict(NamedTuple):
    """What a validation says of the parameters."""

    is_best: bool
    exploded: bool


@dataclasses.dataclass
class Validations:
    """The validations of a model in training, over all phases, and the best model so far."""

    best: Any
    """At first the start: a `Density`, or a model with `params`, `with_params`, `event_shape`."""
    best_nll: float = math.inf
    num_worse: int = 0
    """Validations in a row that were worse than the best."""
    points: list[Point] = dataclasses.field(default_factory=list)
    explosions: list[Point] = dataclasses.field(default_factory=list)

    @property
    def getting_worse(self) -> bool:
        return self.num_worse >= PATIENCE_VALIDATIONS

    def add(self, point: Point, params: PyTree) -> Verdict:
        """Note a validation of parameters."""
        self.points.append(point)
        worse = point.step > UNCOUNTED_STEPS and not point.nats <= self.best_nll + WORSE_NATS
        self.num_worse = self.num_worse + 1 if worse else 0
        if point.nats < self.best_nll:
            self.best, self.best_nll = self.best.with_params(params), point.nats
            return Verdict(is_best=True, exploded=False)
        columns = math.prod(self.best.event_shape)
        far = self.best_nll + max(EXPLOSION_NATS, EXPLOSION_NATS_PER_COLUMN * columns)
        exploded = self.best_nll < math.inf and not point.nats < far
        if exploded:
            self.explosions.append(point)
        return Verdict(is_best=False, exploded=exploded)


@compiled
def _nll(
    flow: CNF, devices: Devices, params: PyTree, rows: Rows, key: PRNGKeyArray, weights: Any
) -> Float[Array, ""]:
    def nll(axes, params, rows, key):
        options = {"context": rows.context, "weights": weights}
        return mean_over(flow.nll(params, rows.x, key=key, **options), axes)

    return over_devices(nll, devices.mesh, split=(1,))(params, rows, key)


def evaluation(
    density: Density,
    rows: Rows,
    log_det: float,
    key: PRNGKeyArray,
    devices: Devices,
    weights: np.ndarray | None = None,
) -> Callable[[PyTree], float]:
    """A function of parameters: the mean negative log-density of rows in the flow."""
    weighted = weights is not None
    of_rows = jnp.asarray(weights) if weighted else None
    if devices.mesh is not None and (weighted or len(rows.x) % devices.mesh.size):
        devices = Devices()  # each device evaluates all
    flow = density.flow

    def loose(value):
        return jnp.asarray(np.maximum(value, VALIDATION_TOLERANCE), float)

    options = flow.solve_options
    options = dataclasses.replace(options, rtol=loose(options.rtol), atol=loose(options.atol))
    flow = dataclasses.replace(
        flow, regularizers=(), throw=False, solve_options=options,
        divergence=_for_validation(flow.divergence, density.event_shape),
    )  # fmt: skip
    return lambda params: float(_nll(flow, devices, params, rows, key, of_rows)) - log_det


def _for_validation(divergence: Divergence, event: tuple[int, ...]) -> Divergence:
    """The divergence of validations: exact in few dimensions, and cheap in many."""
    few = math.prod(event) <= MAX_EXACT_DIMENSIONS
    return divergence.without_noise(event) if few else divergence.cheap(event)
