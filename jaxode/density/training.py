"""The training loop of `fit`: take steps, look at the validation rows, keep the best parameters.

The losses are those of `density.flow` on rows that `density.to_flow` has mapped, with any optimizer
of Optax. Copy this file to change the loop; docs/training.md has a shorter one.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxode._checks.arguments import state_dtype
from jaxode._jax.closure import compiled
from jaxode.density.bind import Density
from jaxode.density.table import Rows
from jaxode.divergence import Divergence, auto, hutchinson, is_trace, without_noise
from jaxode.flows.cnf import CNF

AVERAGE = 0.002  # the least weight of a step in the moving average of the parameters
BLOCK = 50  # steps in one compiled loop, and at one rate
FIRST_LOOK, PASSES = (100, 500), 64  # steps before the first look, by passes over the rows
APART = 1.3  # the ratio of steps from one look to the next
APART_SECONDS = 10.0  # from one look to the next at most, if there is a time limit
PATIENCE, WORSE = 5, 0.02  # looks that are so many nats worse, after which training ends early;
UNCOUNTED = 1000  # those of the first steps do not count
EXPLODED, OF_A_COLUMN = 100.0, 10.0  # nats worse, the larger of both,
SLOWER = 0.25  # and the factor of the rate after that
SHORTEST = 250  # steps of a round of a trial
EXACT_UP_TO, LOOSE = 16, 1e-3  # dimensions of a look with the exact trace, and its tolerance


class Point(NamedTuple):
    """A look at the validation rows."""

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


class Phase(NamedTuple):
    """What is minimized, and how."""

    name: str
    loss: Callable[..., Float[Array, ""]]
    """Of parameters, data, context and a key."""
    optimizer: Any
    key: PRNGKeyArray
    warm_up: int = 1
    """Steps in which the updates grow to their size."""


class Limits(NamedTuple):
    """When training ends."""

    steps: float
    end: float = math.inf
    """By `time.perf_counter`."""


class State(NamedTuple):
    """What a step of training changes."""

    arrays: PyTree
    """The floating arrays of the parameters."""
    average: PyTree
    optimizer: Any
    count: Int[Array, ""]


@compiled
def advance(loss, optimizer, batch_size: int, static, state: State, rates, rows: Rows, keys):
    """The state after a step of the optimizer for each key."""
    import optax  # `import jaxode` does not load it

    update = optax.with_extra_args_support(optimizer).update
    rate, warm_up = rates  # the part of an update that is made, and the steps of the warm-up

    def step(state, key):
        row_key, key = jax.random.split(key)
        drawn = jax.random.randint(row_key, (batch_size,), 0, len(rows.x))
        x, context = jax.tree.map(lambda leaf: leaf[drawn], rows)
        of_arrays = lambda arrays: loss(eqx.combine(arrays, static), x, context, key)
        value, gradient = jax.value_and_grad(of_arrays)(state.arrays)
        of_loss = {"value": value, "grad": gradient, "value_fn": of_arrays}
        ascent = jax.tree.map(jnp.conj, gradient)  # that of a complex parameter
        updates, inner = update(ascent, state.optimizer, state.arrays, **of_loss)
        now = rate * jnp.minimum(1.0, (state.count + 1) / warm_up)
        arrays = jax.tree.map(lambda a, u: a + now.astype(a.dtype) * u, state.arrays, updates)
        # The mean of the last tenth of the steps, at most of the last 500.
        weight = jnp.maximum(AVERAGE, 10 / (10 + state.count))
        mean = lambda a, b: a + (b.astype(a.dtype) - a) * weight.astype(a.dtype)
        average = jax.tree.map(mean, state.average, arrays)
        return State(arrays, average, inner, state.count + 1), None

    return jax.lax.scan(step, state, keys)[0]


@compiled
def _nll(flow: CNF, params: PyTree, rows: Rows, key: PRNGKeyArray) -> Float[Array, ""]:
    return flow.nll(params, rows.x, key=key, context=rows.context)


def evaluation(
    density: Density, rows: Rows, log_det: float, key: PRNGKeyArray
) -> Callable[[PyTree], float]:
    """A function of parameters: the mean negative log-density of rows in the flow."""
    flow = density.flow
    loose = lambda value: jnp.maximum(jnp.asarray(value, float), LOOSE)
    options = flow.solve_options
    options = dataclasses.replace(options, rtol=loose(options.rtol), atol=loose(options.atol))
    flow = dataclasses.replace(
        flow, regularizers=(), steer=0.0, quadrature="gauss", throw=False, solve_options=options,
        divergence=_of_look(flow.divergence, density.event_shape),
    )  # fmt: skip
    return lambda params: float(_nll(flow, params, rows, key)) - log_det


def _of_look(divergence: Divergence, event: tuple[int, ...]) -> Divergence:
    """Exact in few dimensions, and cheap in many, where `exact()` asks for no closed form."""
    exact = without_noise(divergence, event)
    if math.prod(event) <= EXACT_UP_TO:
        return exact
    if is_trace(divergence):
        return hutchinson()
    return divergence if divergence is exact and divergence.choose is None else auto()


@dataclasses.dataclass
class Training:
    """Parameters in training, and the best that the validation rows have seen."""

    density: Density
    """Where it starts."""
    data: Callable[[PRNGKeyArray], Rows]
    """The rows to train on, as the flow sees them."""
    evaluate: Callable[[PyTree], float]
    count: int
    """Of the rows to train on."""
    batch_size: int
    begin: float
    progress: bool

    def __post_init__(self):
        self.best, self.least = self.density, math.inf
        self.exploded = max(EXPLODED, OF_A_COLUMN * math.prod(self.density.event_shape))
        least, most = FIRST_LOOK
        # A few hundred rows are overfitted within `most` steps.
        self.first = min(max(PASSES * self.count / self.batch_size, least), most)
        self.points: list[Point] = []
        self.explosions: list[Point] = []
        self.phase: Any = None
        self.blocks = 0  # so far, also of those that were taken back

    def start(self, phase: Phase) -> None:
        """Begin a phase from the best parameters."""
        self.phase, self.step, self.stale = phase, 0, 0
        arrays, self.static = eqx.partition(self.best.params, eqx.is_inexact_array)
        # In half precision, the average would not move by so small steps.
        average = jax.tree.map(lambda leaf: leaf.astype(state_dtype(leaf)), arrays)
        count = jnp.zeros((), jnp.int32)
        self.state = State(arrays, average, phase.optimizer.init(arrays), count)
        self.began, self.early, self.left, self.rate = time.perf_counter(), None, 1.0, 1.0
        self.kept = self.step, self.state, self.left
        self.look()

    def train(self, phase: Phase, limits: Limits, part: float = math.inf) -> None:
        """Train up to the limits of the phase, or for a part of them."""
        if phase is not self.phase:
            self.start(phase)
        most, end = limits
        pause, until = self.step + min(max(part * most, SHORTEST), 4 * part * most), None
        self.left = self.part_left(limits)
        while self.left > 0 and self.step < pause:
            self.block(int(min(BLOCK, most - self.step)))
            now = time.perf_counter()
            if until is None:  # time counts from here, since the first block may have compiled
                until = now + part * (end - self.begin)
                self.began = now if self.step <= BLOCK else self.began
            waited = end < math.inf and now > self.looked + APART_SECONDS
            if self.step >= min(self.due, most) or waited:
                self.look()
            if not self.early and self.stale >= PATIENCE:
                # As many steps again, from where it was best.
                self.step, self.state, left = self.kept
                self.early = self.step, left
                self.due = APART * self.step
            self.left = self.part_left(limits)
            if now >= until:
                break
        self.look_again()

    def block(self, count: int) -> None:
        """Take so many steps."""
        phase, self.blocks = self.phase, self.blocks + 1
        block_key = jax.random.fold_in(phase.key, self.blocks - 1)
        # `fold_in` of a number beyond those of the steps: a key that none of them has.
        rows = self.data(jax.random.fold_in(block_key, BLOCK))
        keys = jax.random.split(block_key, count)
        rate = jnp.asarray(self.rate * math.sin(0.5 * math.pi * self.left) ** 2)
        rates = rate, jnp.asarray(phase.warm_up, jnp.int32)
        given = phase.loss, phase.optimizer, self.batch_size, self.static
        self.state = jax.block_until_ready(advance(*given, self.state, rates, rows, keys))
        self.step += count

    def part_left(self, limits: Limits) -> float:
        """The part of training that is left."""
        of_time, now, end = 1.0, time.perf_counter(), limits.end
        if end < math.inf:
            of_time = (end - now) / (end - self.began) if now < end else 0.0
        of_steps = 1 - self.step / limits.steps
        if self.early is not None:
            best, left = self.early
            of_steps = min(of_steps, left * (2 - self.step / best) if best else 0.0)
        return min(of_steps, of_time)

    def look_again(self) -> None:
        """Look at what came after the last look."""
        if self.points and self.points[-1].step != self.step:
            self.look()

    def look(self) -> None:
        """Evaluate the average on the validation rows. Keep the best; go back if it exploded."""
        as_given = lambda mean, leaf: mean.astype(leaf.dtype)
        average = jax.tree.map(as_given, self.state.average, self.state.arrays)
        params = eqx.combine(average, self.static)
        nats = self.evaluate(params)
        self.looked = time.perf_counter()
        self.due = max(self.first, APART * self.step)
        self.points.append(Point(self.phase.name, self.step, self.looked - self.begin, nats))
        worse = self.step > UNCOUNTED and not nats <= self.least + WORSE
        self.stale = self.stale + 1 if worse else 0
        if nats < self.least:
            self.best, self.least = self.best.with_params(params), nats
            self.kept = self.step, self.state, self.left
        elif self.least < math.inf and not nats < self.least + self.exploded:
            self.explosions.append(self.points[-1])
            _, self.state, _ = self.kept
            self.rate *= SLOWER
        if self.progress:
            text = f"\r{self.phase.name}: step {self.step}, {nats:.3f} nats of validation rows"
            print(f"{text}, best {self.least:.3f} ", end="", file=sys.stderr, flush=True)
