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
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxode._checks.arguments import integer, non_negative, state_dtype
from jaxode._jax.closure import compiled
from jaxode._jax.sharding import mean_over, of_device, on_all, over_devices, split_over, vary
from jaxode.density.density import Density
from jaxode.flows.cnf import CNF
from jaxode.flows.divergence import Divergence, auto, hutchinson, is_trace, without_noise
from jaxode.training.display import described, show
from jaxode.training.processes import are_several, of_first
from jaxode.training.rows import Rows

AVERAGE = 0.002  # the least weight of a step in the moving average of the parameters
# Steps at one rate, between two checks of the limits, and seconds of a part of them: a program.
BLOCK, BLOCK_SECONDS = 50, 1.0
# Steps before the first validation, at least and at most, by so many passes over the rows; and the
# ratio of steps from one validation to the next.
FIRST_VALIDATION, PASSES, APART = (100, 500), 64, 1.3
# If time is limited, a validation is due after so many seconds, and none before so many times as
# long as one takes.
APART_SECONDS, APART_VALIDATIONS = 10.0, 4.0
SAY_APART = 1.0  # seconds from one line of progress to the next, between validations
# Validations that are so many nats worse, after which training ends early.
PATIENCE, WORSE = 5, 0.02
UNCOUNTED = 1000  # steps at the start, whose validations do not count
EXPLODED, OF_A_COLUMN = 100.0, 10.0  # nats worse, the larger of both,
SLOWER = 0.25  # and the factor of the rate after that
MINUTE = 60.0  # seconds, if there is no other end
TRACED_UP_TO, LOOSE = 16, 1e-3  # dimensions of a validation with the exact trace, and its tolerance


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
    def of(cls, steps: Any, seconds: Any) -> "Limits":
        """Those that are given, or a minute."""
        if seconds is None and steps is None:
            seconds = MINUTE
        return cls(
            math.inf if steps is None else integer("steps", steps),
            math.inf if seconds is None else non_negative("seconds", seconds),
        )


class Clock:
    """Seconds of training so far, without compilation, and of the last step."""

    def __init__(self, mesh: Mesh | None = None):
        self.mesh = mesh
        self.spent, self.step = 0.0, math.inf
        self.compiled: set[str] = set()  # phases

    @contextlib.contextmanager
    def running(self):
        begin = time.perf_counter()
        yield
        self.spent = of_first(self.spent + (time.perf_counter() - begin), self.mesh)

    def steps_remaining(self, limits: Limits) -> float:
        """The number of steps that fit in the time left."""
        if limits.seconds == math.inf:
            return math.inf
        return max(limits.seconds - self.spent, 0.0) / self.step


class State(NamedTuple):
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
    mesh: Mesh | None = None
    in_order: bool = False
    """Whether steps take the rows of a block one after the other, or draw them."""


@compiled
def advance(program: Program, state: State, rates, rows: Rows, key, steps):
    """The state after steps from one number to another, each with a key of its own."""
    take = functools.partial(_take_steps, program)
    split = (2,) if are_several(program.mesh) else ()  # the rows, of which each process has its own
    return over_devices(take, program.mesh, split)(state, rates, rows, key, steps)


def _take_steps(program: Program, axes, state: State, rates, rows: Rows, key, steps):
    """The steps of a device: of its part of each batch, and of all parameters."""
    import optax  # `import jaxode` does not load it

    update = optax.with_extra_args_support(program.optimizer).update
    rate, warm_up = rates  # the part of an update that is made, and the steps of the warm-up

    def step(i, state):
        row_key, step_key = jax.random.split(jax.random.fold_in(key, i))
        if program.in_order:
            count = len(rows.x) // BLOCK  # less than a batch, if the device has rows of its own
            drawn = i * count + jnp.arange(count)
        else:
            count = program.batch_size
            drawn = jax.random.randint(row_key, (count,), 0, len(rows.x))
        part = of_device(drawn, axes) if count == program.batch_size else drawn
        x, context = jax.tree.map(lambda leaf: leaf[part], rows)
        params = lambda arrays: eqx.combine(arrays, program.static)
        of_part = lambda arrays: program.loss(params(arrays), x, context, step_key)
        # Made to vary, so that devices exchange their gradients at the end, and once.
        arrays = vary(program.unravel(state.arrays), frozenset(axes))
        value, gradient = jax.value_and_grad(of_part)(arrays)
        if program.unravel is not _same:
            gradient, _ = ravel_pytree(gradient)
        value, gradient = mean_over((value, gradient), axes)
        of_arrays = lambda arrays: mean_over(of_part(arrays), axes)
        of_loss = {"value": value, "grad": gradient, "value_fn": of_arrays}
        ascent = jax.tree.map(jnp.conj, gradient)  # that of a complex parameter
        updates, inner = update(ascent, state.optimizer, state.arrays, **of_loss)
        now = rate * jnp.minimum(1.0, (state.count + 1) / warm_up)
        arrays = jax.tree.map(lambda a, u: a + now.astype(a.dtype) * u, state.arrays, updates)
        # The mean of the last tenth of the steps, at most of the last 500.
        weight = jnp.maximum(AVERAGE, 10 / (10 + state.count))
        mean = lambda a, b: a + (b.astype(a.dtype) - a) * weight.astype(a.dtype)
        average = jax.tree.map(mean, state.average, arrays)
        return State(arrays, average, inner, state.count + 1)

    first, last = steps
    return jax.lax.fori_loop(first, last, step, state)


@compiled
def _nll(
    flow: CNF, mesh: Mesh | None, params: PyTree, rows: Rows, key: PRNGKeyArray
) -> Float[Array, ""]:
    def nll(axes, params, rows, key):
        return mean_over(flow.nll(params, rows.x, key=key, context=rows.context), axes)

    return over_devices(nll, mesh, split=(1,))(params, rows, key)


def evaluation(
    density: Density, rows: Rows, log_det: float, key: PRNGKeyArray, mesh: Mesh | None = None
) -> Callable[[PyTree], float]:
    """A function of parameters: the mean negative log-density of rows in the flow."""
    if mesh is not None and len(rows.x) % mesh.size:
        mesh = None  # each device evaluates all
    flow = density.flow
    loose = lambda value: jnp.asarray(np.maximum(value, LOOSE), float)
    options = flow.solve_options
    options = dataclasses.replace(options, rtol=loose(options.rtol), atol=loose(options.atol))
    flow = dataclasses.replace(
        flow, regularizers=(), throw=False, solve_options=options,
        divergence=_for_validation(flow.divergence, density.event_shape),
    )  # fmt: skip
    return lambda params: float(_nll(flow, mesh, params, rows, key)) - log_det


def _for_validation(divergence: Divergence, event: tuple[int, ...]) -> Divergence:
    """Exact in few dimensions, and cheap in many, where `exact()` asks for no closed form."""
    exact = without_noise(divergence, event)
    if math.prod(event) <= TRACED_UP_TO:
        return exact
    if is_trace(divergence):
        return hutchinson()
    return divergence if divergence is exact and divergence.choose is None else auto()


@dataclasses.dataclass
class Training:
    """Parameters in training, and the best that the validation rows have seen."""

    density: Density
    """The start of the training."""
    data: Callable[[PRNGKeyArray], Rows]
    """The rows to train on, as the flow sees them."""
    evaluate: Callable[[PyTree], float]
    count: int
    """The number of rows to train on."""
    batch_size: int
    begin: float
    clock: Clock
    progress: bool
    mesh: Mesh | None = None
    in_order: bool = False
    """Whether steps take the rows of a block one after the other."""

    def __post_init__(self):
        self.best, self.best_nll = self.density, math.inf
        self.progress = self.progress and (not are_several(self.mesh) or jax.process_index() == 0)
        self.exploded = max(EXPLODED, OF_A_COLUMN * math.prod(self.density.event_shape))
        least, most = FIRST_VALIDATION
        # A few hundred rows are overfitted within `most` steps.
        self.first = min(max(PASSES * self.count / self.batch_size, least), most)
        self.points: list[Point] = []
        self.explosions: list[Point] = []
        self.phase: Any = None
        self.blocks = 0  # so far, also of those that were taken back
        self.used = BLOCK  # steps that have drawn from the rows at hand
        self.data_seconds = self.validation_seconds = 0.0  # that the last of them took

    def start(self, phase: Phase) -> None:
        """Begin a phase from the best parameters."""
        self.say(f"{phase.name}: compiling")
        arrays, static = eqx.partition(self.best.params, eqx.is_inexact_array)
        unravel = _same
        if phase.as_vector and len({leaf.dtype for leaf in jax.tree.leaves(arrays)}) == 1:
            arrays, unravel = ravel_pytree(arrays)
        # In half precision, the average would not move by so small steps.
        average = jax.tree.map(lambda leaf: leaf.astype(state_dtype(leaf)), arrays)
        count = jnp.zeros((), jnp.int32)
        state = State(arrays, average, phase.optimizer.init(arrays), count)
        state = on_all(state, self.mesh)
        program = Program(
            phase.loss, phase.optimizer, self.batch_size, static, unravel, self.mesh, self.in_order
        )
        # Together, since Ctrl-C validates the state.
        self.phase, self.program, self.state = phase, program, state
        self.step, self.num_worse, self.resumed_at, self.remaining, self.rate = 0, 0, None, 1.0, 1.0
        self.kept, before = (self.step, self.state, self.remaining), self.clock.spent
        self.clock.step = math.inf
        self.validate()
        self.blocks, self.used = 0, BLOCK
        if phase.name not in self.clock.compiled:
            self.used = BLOCK + 1
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
            due = self.step >= min(self.due, limits.steps) or (timed and since > APART_SECONDS)
            if due and not (timed and since < APART_VALIDATIONS * self.validation_seconds):
                self.validate()
                self.tell()
            if not self.resumed_at and self.num_worse >= PATIENCE:
                # As many steps again, from where it was best.
                self.step, self.state, left = self.kept
                self.resumed_at = self.step, left
                self.due = APART * self.step
            self.remaining = self.part_remaining()

    def block(self, most: float) -> None:
        """Take up to 50 steps, in parts of about a second. With a limit of time, take one part."""
        clock, limits = self.clock, self.limits
        end, timed = self.step + min(BLOCK, most), limits.seconds < math.inf
        if not timed and self.used:
            self.used = BLOCK
        while self.step < end:
            count = min(end - self.step, max(BLOCK_SECONDS / clock.step, 1))
            if timed:
                count = min(count, max(clock.steps_remaining(limits), 1))
                if self.used < BLOCK:
                    count = min(count, BLOCK - self.used)
            with clock.running():
                seconds = self.advance(int(count))
            self.step += int(count)
            clock.step = of_first(seconds / int(count) + self.data_seconds / BLOCK, self.mesh)
            if time.perf_counter() > self.said + SAY_APART:
                self.tell(look=False)
            if timed:
                return

    def advance(self, count: int) -> float:
        """Change the state by so many steps. Returns the seconds that they took."""
        phase = self.phase
        if self.used + count > BLOCK:
            begin = time.perf_counter()
            self.blocks, self.used = self.blocks + 1, 0
            self.key = jax.random.fold_in(phase.key, self.blocks)
            # `fold_in` of a number beyond those of the steps: a key that none of them has.
            rows = self.data(jax.random.fold_in(self.key, BLOCK))
            if self.mesh is not None:
                put = split_over if are_several(self.mesh) else on_all
                rows = put(rows, self.mesh)
            self.rows = jax.block_until_ready(rows)
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
        """Validate what came after the last validation."""
        if self.points and self.points[-1].step != self.step:
            self.validate()
            self.tell()

    def validate(self) -> None:
        """Evaluate the average on the validation rows. Keep the best; go back if it exploded."""
        as_given = lambda mean, leaf: mean.astype(leaf.dtype)
        average = jax.tree.map(as_given, self.state.average, self.state.arrays)
        params = eqx.combine(self.program.unravel(average), self.program.static)
        before = self.clock.spent
        with self.clock.running():
            nats = self.evaluate(params)
        self.validated, self.validation_seconds = self.clock.spent, self.clock.spent - before
        self.due = max(self.first, APART * self.step)
        seconds = time.perf_counter() - self.begin
        self.points.append(Point(self.phase.name, self.step, seconds, nats))
        worse = self.step > UNCOUNTED and not nats <= self.best_nll + WORSE
        self.num_worse = self.num_worse + 1 if worse else 0
        if nats < self.best_nll:
            self.best, self.best_nll = self.best.with_params(params), nats
            self.kept = self.step, self.state, self.remaining
        elif self.best_nll < math.inf and not nats < self.best_nll + self.exploded:
            self.explosions.append(self.points[-1])
            _, self.state, _ = self.kept
            self.rate *= SLOWER

    def tell(self, *, look: bool = True) -> None:
        """Say how far training is, at a look at the validation rows or between two."""
        limits, clock = self.limits, self.clock
        steps = f"{self.step}" if limits.steps == math.inf else f"{self.step} of {limits.steps}"
        text = described(self.phase.name, steps, self.points[-1].nats, self.best_nll)
        by_steps = (limits.steps - self.step) * clock.step  # NaN before the first
        if (left := min(limits.seconds - clock.spent, by_steps)) < math.inf:
            text += f", {max(left, 0):.0f} s left"
        self.say(text, look=look)

    def say(self, text: str, *, look: bool = True) -> None:
        self.said = time.perf_counter()
        if self.progress:
            show(text, look=look)
