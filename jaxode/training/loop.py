"""The training loop of `fit`: take steps, validate, keep the best parameters.

The losses are those of `density.flow` on rows that `density.to_flow` has mapped, with any optimizer
of Optax. Copy this file to change the loop; docs/training.md has a shorter one.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import PRNGKeyArray, PyTree

from jaxode._checks.arguments import state_dtype
from jaxode.coupling import Coupling, independent
from jaxode.training.budget import Budget
from jaxode.training.devices import Devices
from jaxode.training.schedule import Resumed, Schedule, first_validation, size_of_steps
from jaxode.training.sources import Rows, Source
from jaxode.training.steps import (
    STEPS_PER_BLOCK,
    Phase,
    Program,
    TrainingState,
    advance,
    unchanged,
)
from jaxode.training.validations import Point, Validations

SECONDS_PER_PROGRAM = 1.0  # split a block of steps that takes longer
SECONDS_PER_LINE = 1.0  # of progress, between validations
EXPLOSION_RATE_FACTOR = 0.25  # by which the rate shrinks when training has exploded


class Plan(NamedTuple):
    """Options of a training. `fit` documents them."""

    budget: Budget
    batch_size: int = 512
    optimizer: Any = None
    coupling: Coupling = independent()
    powers: tuple[float, ...] = (2.0,)
    """Powers of the time, to be tried."""
    likelihood: int = 0
    devices: Devices = Devices()


class Blocks:
    """The rows that steps draw from, read for a block of steps at a time."""

    def __init__(self, take: Callable[[PRNGKeyArray], Rows], devices: Devices):
        self.take, self.devices = take, devices
        self.seconds = 0.0  # that the last reading took
        self.restart()

    def restart(self) -> None:
        """Begin a phase: the next steps read the rows of its first block, even if they are none."""
        self.count = 0  # blocks, including those that training went back over
        self.used = STEPS_PER_BLOCK + 1  # steps that have drawn from the rows at hand

    @property
    def left(self) -> int:
        """Steps that may still draw from the rows at hand; of a new block, if there are none."""
        return STEPS_PER_BLOCK - self.used if self.used < STEPS_PER_BLOCK else STEPS_PER_BLOCK

    def end(self) -> None:
        """Let the next steps read new rows, if any have drawn from those at hand."""
        if self.used:
            self.used = STEPS_PER_BLOCK

    def steps(self, key: PRNGKeyArray, count: int, stopwatch: Any) -> tuple[Any, Any, Any]:
        """The rows of so many steps, the key of their block, and their numbers within it."""
        if self.used + count > STEPS_PER_BLOCK:
            begin = stopwatch.now
            self.count, self.used = self.count + 1, 0
            self.key = jax.random.fold_in(key, self.count)
            # `fold_in` of a number beyond those of the steps: a key that none of them has.
            own_key = self.devices.own_key(jax.random.fold_in(self.key, STEPS_PER_BLOCK))
            self.rows = jax.block_until_ready(self.devices.put_rows(self.take(own_key)))
            self.seconds = stopwatch.now - begin
        first, self.used = self.used, self.used + count
        numbers = jnp.asarray(first, jnp.int32), jnp.asarray(self.used, jnp.int32)
        return self.rows, self.key, numbers


class Reached(NamedTuple):
    """Where a training was at its best validation."""

    step: int
    state: TrainingState
    part_left: float


@dataclasses.dataclass
class Training:
    """Parameters in training, through one phase after another."""

    model: Any
    """The start of the training: a `Density`, or a model with its `params`, `with_params` and
    `event_shape`."""
    source: Source
    take: Callable[[PRNGKeyArray], Rows]
    """Takes rows of the source for a block of steps, as the flow sees them."""
    evaluate: Callable[[PyTree], float]
    plan: Plan
    label: str = ""
    """Names the network in messages, if there are several."""

    def __post_init__(self):
        self.validations = Validations(self.model)
        self.blocks = Blocks(self.take, self.plan.devices)
        self.budget, self.stopwatch = self.plan.budget, self.plan.budget.stopwatch
        self.phase: Any = None
        self.seconds_per_step = math.inf
        self.seconds_per_validation = 0.0

    @property
    def best(self) -> Any:
        """The model with the best parameters."""
        return self.validations.best

    @property
    def best_nll(self) -> float:
        return self.validations.best_nll

    @property
    def points(self) -> list[Point]:
        return self.validations.points

    def start(self, phase: Phase) -> None:
        """Begin a phase from the best parameters."""
        self.write(f"{phase.name}{self.label}: compiling")
        arrays, static = eqx.partition(self.best.params, eqx.is_inexact_array)
        unravel = unchanged
        if phase.as_vector and len({leaf.dtype for leaf in jax.tree.leaves(arrays)}) == 1:
            arrays, unravel = ravel_pytree(arrays)
        # In half precision, the average would not move by so small steps.
        average = jax.tree.map(lambda leaf: leaf.astype(state_dtype(leaf)), arrays)
        count = jnp.zeros((), jnp.int32)
        state = TrainingState(arrays, average, phase.optimizer.init(arrays), count)
        state = self.plan.devices.put_state(state)
        program = Program(
            phase.loss, phase.optimizer, self.plan.batch_size, static, unravel, self.plan.devices,
            self.source.in_order,
        )  # fmt: skip
        first = first_validation(self.source.count, self.plan.batch_size)
        schedule = Schedule(self.budget, self.stopwatch.spent, first)
        # Set together, since Ctrl-C may come between, and validates the state.
        self.phase, self.program, self.state, self.schedule = phase, program, state, schedule
        self.step, self.part_left, self.rate = 0, 1.0, 1.0
        self.kept = Reached(self.step, self.state, self.part_left)
        self.validations.num_worse = 0
        self.seconds_per_step = math.inf
        self.validate()
        self.blocks.restart()
        self.advance(0)  # which compiles the step
        self.tell()

    def train(self, phase: Phase, budget: Budget, steps: float = math.inf) -> None:
        """Train up to the limits of the phase, or for so many steps."""
        if phase is not self.phase:
            self.budget = budget
            self.start(phase)
        pause = min(self.step + steps, budget.steps)
        self.part_left = self.schedule.part_left(self.step)
        while self.part_left > 0 and self.step < pause:
            self.block(pause - self.step)
            since = self.stopwatch.spent - self.validated
            if self.schedule.is_due(self.step, self.due, since, self.seconds_per_validation):
                self.validate()
                self.tell()
            if not self.schedule.resumed and self.validations.getting_worse:
                # As many steps again, from where it was best.
                self.step, self.state, part = self.kept
                self.schedule = self.schedule._replace(resumed=Resumed(self.step, part))
                self.due = self.schedule.validation_after(self.step)
            self.part_left = self.schedule.part_left(self.step)

    @property
    def ended(self) -> bool:
        """Whether it is at the limits of its phase."""
        return not (self.part_left > 0 and self.step < self.budget.steps)

    @property
    def steps_in_time(self) -> float:
        """The number of steps that fit in the seconds left."""
        left = self.budget.seconds_left
        return math.inf if left == math.inf else left / self.seconds_per_step

    def block(self, most: float) -> None:
        """Take up to 50 steps, in parts of about a second. With a limit of time, take one part."""
        devices, timed = self.plan.devices, self.budget.timed
        end = self.step + min(STEPS_PER_BLOCK, most)
        if not timed:
            self.blocks.end()
        while self.step < end:
            count = min(end - self.step, max(SECONDS_PER_PROGRAM / self.seconds_per_step, 1))
            if timed:
                count = min(count, max(self.steps_in_time, 1), self.blocks.left)
            with self.stopwatch.running(devices):
                seconds = self.advance(int(count))
            self.step += int(count)
            seconds = seconds / int(count) + self.blocks.seconds / STEPS_PER_BLOCK
            self.seconds_per_step = devices.of_first(seconds)
            if time.perf_counter() > self.written + SECONDS_PER_LINE:
                self.tell(in_file=False)
            if timed:
                return

    def advance(self, count: int) -> float:
        """Change the state by so many steps. Returns the seconds that they took."""
        rows, key, numbers = self.blocks.steps(self.phase.key, count, self.stopwatch)
        rate = jnp.asarray(self.rate * size_of_steps(self.part_left))
        rates = rate, jnp.asarray(self.phase.warm_up, jnp.int32)
        begin = self.stopwatch.now
        self.state = jax.block_until_ready(
            advance(self.program, self.state, rates, rows, key, numbers)
        )
        return self.stopwatch.now - begin

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
        before = self.stopwatch.spent
        # The seconds of a call begin with its first step.
        with self.stopwatch.running(self.plan.devices) if before else contextlib.nullcontext():
            nats = self.evaluate(params)
        self.validated = self.stopwatch.spent
        self.seconds_per_validation = self.validated - before
        self.due = self.schedule.validation_after(self.step)
        point = Point(self.phase.name, self.step, self.stopwatch.since_call, nats)
        verdict = self.validations.add(point, params)
        if verdict.is_best:
            self.kept = Reached(self.step, self.state, self.part_left)
        elif verdict.exploded:
            self.state = self.kept.state
            self.rate *= EXPLOSION_RATE_FACTOR

    def tell(self, *, in_file: bool = True) -> None:
        """Show how far training is, after a validation (`in_file`) or between two."""
        budget = self.budget
        steps = f"{self.step}" if budget.steps == math.inf else f"{self.step} of {budget.steps}"
        text = (
            f"{self.phase.name}{self.label}: step {steps}, validation loss "
            f"{self.points[-1].nats:.3f} nats, best {self.best_nll:.3f}"
        )
        by_steps = (budget.steps - self.step) * self.seconds_per_step  # NaN before the first
        if (left := min(budget.seconds_left, by_steps)) < math.inf:
            text += f", {left:.0f} s left"
        self.write(text, in_file=in_file)

    def write(self, text: str, *, in_file: bool = True) -> None:
        self.written = time.perf_counter()
        self.budget.write(text, in_file=in_file)
