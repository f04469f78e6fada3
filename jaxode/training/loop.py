"""The training loop of `fit`: take steps, validate, keep the best parameters.

The losses are those of `density.flow` on rows that `density.to_flow` has mapped, with any optimizer
of Optax. Copy this file to change the loop; docs/training.md has a shorter one.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxode._checks.arguments import integer, non_negative, state_dtype
from jaxode._jax.closure import compiled
from jaxode._jax.sharding import mean_over, of_device, over_devices, vary
from jaxode.coupling import Coupling, independent
from jaxode.density.density import Density
from jaxode.divergence import Divergence
from jaxode.flows.cnf import CNF
from jaxode.training.devices import Devices
from jaxode.training.display import described, show
from jaxode.training.sources import Rows, Source

MIN_AVERAGE_WEIGHT = 0.002  # of a step in the moving average of the parameters
STEPS_PER_BLOCK = 50  # at one rate, between two checks of the limits
SECONDS_PER_PROGRAM = 1.0  # split a block of steps that takes longer
FIRST_VALIDATION_PASSES = 64  # over the rows, after which the first validation is due
FIRST_VALIDATION_STEPS = 100, 500  # bounds of the step of the first validation
VALIDATION_STEP_RATIO = 1.3  # of the steps at one validation to those at the last one
# If time is limited, a validation is due after so many seconds, and none before so many times as
# long as one takes.
SECONDS_PER_VALIDATION = 10.0
VALIDATION_TIME_RATIO = 4.0
SECONDS_PER_LINE = 1.0  # of progress, between validations
# Training ends early after so many validations in a row that are so much worse than the best. Those
# of the first steps do not count.
PATIENCE_VALIDATIONS = 5
WORSE_NATS = 0.02
UNCOUNTED_STEPS = 1000
# Training has exploded if a validation is worse by the larger of both. The rate then shrinks.
EXPLOSION_NATS = 100.0
EXPLOSION_NATS_PER_COLUMN = 10.0
EXPLOSION_RATE_FACTOR = 0.25
DEFAULT_SECONDS = 60.0  # of training, if it has no limit
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


class Limits(NamedTuple):
    """When training ends."""

    steps: float
    seconds: float = math.inf
    """Seconds of training, summed over candidates."""

    @classmethod
    def from_arguments(cls, steps: Any, seconds: Any) -> "Limits":
        """The limits of the user, or a minute."""
        if seconds is None and steps is None:
            seconds = DEFAULT_SECONDS
        return cls(
            math.inf if steps is None else integer("steps", steps),
            math.inf if seconds is None else non_negative("seconds", seconds),
        )


class Plan(NamedTuple):
    """Options of a training. `fit` documents them."""

    limits: Limits
    batch_size: int = 512
    optimizer: Any = None
    coupling: Coupling = independent()
    powers: tuple[float, ...] = (2.0,)
    """Powers of the time, to be tried."""
    likelihood: int = 0
    progress: bool = True
    devices: Devices = Devices()


class Clock:
    """Seconds since the call, seconds of training so far, without compilation, and of a step."""

    def __init__(self, begin: float):
        self.begin = begin
        self.spent, self.step = 0.0, math.inf
        self.compiled: set[str] = set()  # phases

    @property
    def since_call(self) -> float:
        return time.perf_counter() - self.begin

    @contextlib.contextmanager
    def running(self, devices: Devices = Devices()):
        """Count the time within. All processes have the clock of the first one."""
        begin = time.perf_counter()
        yield
        self.spent = devices.of_first(self.spent + (time.perf_counter() - begin))

    def steps_remaining(self, limits: Limits) -> float:
        """The number of steps that fit in the time left."""
        if limits.seconds == math.inf:
            return math.inf
        return max(limits.seconds - self.spent, 0.0) / self.step


class TrainingState(NamedTuple):
    """The state of the optimization."""

    arrays: PyTree
    """The floating arrays of the parameters, or one vector of them."""
    average: PyTree
    optimizer: Any
    count: Int[Array, ""]


def _same(tree: PyTree) -> PyTree:
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
        if program.unravel is not _same:
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


@dataclasses.dataclass
class Training:
    """Parameters in training, and the best ones by the validation rows."""

    density: Any
    """The start of the training: a `Density`, or a model with its `params`, `with_params` and
    `event_shape`."""
    source: Source
    take: Callable[[PRNGKeyArray], Rows]
    """Takes rows of the source for a block of steps, as the flow sees them."""
    evaluate: Callable[[PyTree], float]
    plan: Plan
    clock: Clock
    label: str = ""
    """Names the network in messages, if there are several."""

    def __post_init__(self):
        self.best, self.best_nll = self.density, math.inf
        self.devices = self.plan.devices
        self.progress = self.plan.progress and self.devices.first_process
        self.exploded = max(
            EXPLOSION_NATS, EXPLOSION_NATS_PER_COLUMN * math.prod(self.density.event_shape)
        )
        least, most = FIRST_VALIDATION_STEPS
        # A few hundred rows are overfitted within `most` steps.
        self.first = min(
            max(FIRST_VALIDATION_PASSES * self.source.count / self.plan.batch_size, least), most
        )
        self.points: list[Point] = []
        self.explosions: list[Point] = []
        self.phase: Any = None
        self.blocks = 0  # so far, including those that training went back over
        self.used = STEPS_PER_BLOCK  # steps that have drawn from the rows at hand
        # Seconds that the last reading of rows and the last validation took.
        self.data_seconds = self.validation_seconds = 0.0

    def start(self, phase: Phase) -> None:
        """Begin a phase from the best parameters."""
        self.say(f"{phase.name}{self.label}: compiling")
        arrays, static = eqx.partition(self.best.params, eqx.is_inexact_array)
        unravel = _same
        if phase.as_vector and len({leaf.dtype for leaf in jax.tree.leaves(arrays)}) == 1:
            arrays, unravel = ravel_pytree(arrays)
        # In half precision, the average would not move by so small steps.
        average = jax.tree.map(lambda leaf: leaf.astype(state_dtype(leaf)), arrays)
        count = jnp.zeros((), jnp.int32)
        state = TrainingState(arrays, average, phase.optimizer.init(arrays), count)
        state = self.devices.put_state(state)
        program = Program(
            phase.loss, phase.optimizer, self.plan.batch_size, static, unravel, self.devices,
            self.source.in_order,
        )  # fmt: skip
        # Set together, since Ctrl-C may come between, and validates the state.
        self.phase, self.program, self.state = phase, program, state
        self.step, self.num_worse, self.resumed_at, self.remaining, self.rate = 0, 0, None, 1.0, 1.0
        self.kept, before = (self.step, self.state, self.remaining), self.clock.spent
        self.clock.step = math.inf
        self.validate()
        self.blocks, self.used = 0, STEPS_PER_BLOCK
        if phase.name not in self.clock.compiled:
            self.used = STEPS_PER_BLOCK + 1
            self.advance(0)  # on the rows of the first block
            self.clock.compiled.add(phase.name)
            # Training begins when its programs are compiled.
            self.clock.spent, self.validation_seconds = before, 0.0
        self.began = self.validated = self.clock.spent
        self.tell()

    def train(self, phase: Phase, limits: Limits, steps: float = math.inf) -> None:
        """Train up to the limits of the phase, or for so many steps."""
        self.limits = limits
        if phase is not self.phase:
            self.start(phase)
        pause, timed = min(self.step + steps, limits.steps), limits.seconds < math.inf
        self.remaining = self.part_remaining()
        while self.remaining > 0 and self.step < pause:
            self.block(pause - self.step)
            since = self.clock.spent - self.validated
            due = self.step >= min(self.due, limits.steps) or (
                timed and since > SECONDS_PER_VALIDATION
            )
            if due and not (timed and since < VALIDATION_TIME_RATIO * self.validation_seconds):
                self.validate()
                self.tell()
            if not self.resumed_at and self.num_worse >= PATIENCE_VALIDATIONS:
                # As many steps again, from where it was best.
                self.step, self.state, left = self.kept
                self.resumed_at = self.step, left
                self.due = VALIDATION_STEP_RATIO * self.step
            self.remaining = self.part_remaining()

    @property
    def ended(self) -> bool:
        """Whether it is at the limits of its phase."""
        return not (self.remaining > 0 and self.step < self.limits.steps)

    def block(self, most: float) -> None:
        """Take up to 50 steps, in parts of about a second. With a limit of time, take one part."""
        clock, limits = self.clock, self.limits
        end, timed = self.step + min(STEPS_PER_BLOCK, most), limits.seconds < math.inf
        if not timed and self.used:
            self.used = STEPS_PER_BLOCK
        while self.step < end:
            count = min(end - self.step, max(SECONDS_PER_PROGRAM / clock.step, 1))
            if timed:
                count = min(count, max(clock.steps_remaining(limits), 1))
                if self.used < STEPS_PER_BLOCK:
                    count = min(count, STEPS_PER_BLOCK - self.used)
            with clock.running(self.devices):
                seconds = self.advance(int(count))
            self.step += int(count)
            of_step = seconds / int(count) + self.data_seconds / STEPS_PER_BLOCK
            clock.step = self.devices.of_first(of_step)
            if time.perf_counter() > self.said + SECONDS_PER_LINE:
                self.tell(look=False)
            if timed:
                return

    def advance(self, count: int) -> float:
        """Change the state by so many steps. Returns the seconds that they took."""
        phase = self.phase
        if self.used + count > STEPS_PER_BLOCK:
            begin = time.perf_counter()
            self.blocks, self.used = self.blocks + 1, 0
            self.key = jax.random.fold_in(phase.key, self.blocks)
            # `fold_in` of a number beyond those of the steps: a key that none of them has.
            key = self.devices.own_key(jax.random.fold_in(self.key, STEPS_PER_BLOCK))
            self.rows = jax.block_until_ready(self.devices.put_rows(self.take(key)))
            self.data_seconds = time.perf_counter() - begin
        rate = jnp.asarray(self.rate * math.sin(0.5 * math.pi * self.remaining) ** 2)
        rates = rate, jnp.asarray(phase.warm_up, jnp.int32)
        steps = jnp.asarray(self.used, jnp.int32), jnp.asarray(self.used + count, jnp.int32)
        begin, self.used = time.perf_counter(), self.used + count
        self.state = jax.block_until_ready(
            advance(self.program, self.state, rates, self.rows, self.key, steps)
        )
        return time.perf_counter() - begin

    def part_remaining(self) -> float:
        """The part of training that is left."""
        of_time, limits = 1.0, self.limits
        if limits.seconds < math.inf:
            left = limits.seconds - self.clock.spent
            of_time = left / (limits.seconds - self.began) if left > 0 else 0.0
        of_steps = 1 - self.step / limits.steps
        if self.resumed_at is not None:
            best, left = self.resumed_at
            of_steps = min(of_steps, left * (2 - self.step / best) if best else 0.0)
        return min(of_steps, of_time)

    def validate_again(self) -> None:
        """Validate unless no step was taken since the last validation."""
        if self.points and self.points[-1].step != self.step:
            self.validate()
            self.tell()

    def validate(self) -> None:
        """Evaluate the average on the validation rows. Keep the best; go back if it exploded."""

        def as_given(mean, leaf):
            return mean.astype(leaf.dtype)

        average = jax.tree.map(as_given, self.state.average, self.state.arrays)
        params = eqx.combine(self.program.unravel(average), self.program.static)
        before = self.clock.spent
        with self.clock.running(self.devices):
            nats = self.evaluate(params)
        self.validated, self.validation_seconds = self.clock.spent, self.clock.spent - before
        self.due = max(self.first, VALIDATION_STEP_RATIO * self.step)
        self.points.append(Point(self.phase.name, self.step, self.clock.since_call, nats))
        worse = self.step > UNCOUNTED_STEPS and not nats <= self.best_nll + WORSE_NATS
        self.num_worse = self.num_worse + 1 if worse else 0
        if nats < self.best_nll:
            self.best, self.best_nll = self.best.with_params(params), nats
            self.kept = self.step, self.state, self.remaining
        elif self.best_nll < math.inf and not nats < self.best_nll + self.exploded:
            self.explosions.append(self.points[-1])
            _, self.state, _ = self.kept
            self.rate *= EXPLOSION_RATE_FACTOR

    def tell(self, *, look: bool = True) -> None:
        """Show how far training is, after a validation (`look`) or between two."""
        limits, clock = self.limits, self.clock
        steps = f"{self.step}" if limits.steps == math.inf else f"{self.step} of {limits.steps}"
        text = described(self.phase.name + self.label, steps, self.points[-1].nats, self.best_nll)
        by_steps = (limits.steps - self.step) * clock.step  # NaN before the first
        if (left := min(limits.seconds - clock.spent, by_steps)) < math.inf:
            text += f", {max(left, 0):.0f} s left"
        self.say(text, look=look)

    def say(self, text: str, *, look: bool = True) -> None:
        self.said = time.perf_counter()
        if self.progress:
            show(text, look=look)
