"""Trials of maps and powers of the time, from which `fit` chooses, and turns of networks."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import jax

from jaxode.density.density import Density
from jaxode.training.loop import STEPS_PER_BLOCK, Limits, Phase, Training

# Powers of the time in `matching_loss`. In few dimensions, only the first one is tried.
TIME_POWERS, MAX_DIMENSIONS_OF_ONE_POWER = (2.0, 1.0), 16
# Rounds of a trial. A round takes a part of the training, but at least so many steps, or four such
# parts. Trials that leave fewer than `MIN_REMAINING_STEPS` are left out.
ROUNDS, ROUND_PART, MIN_ROUND_STEPS, MIN_REMAINING_STEPS = 2, 0.025, 250, 1000
BEHIND_NATS = 0.2  # by which a map is out after a round
CLEARLY_BETTER_NATS = 0.2  # by which uniform times must be better


def powers_to_try(columns: int) -> tuple[float, ...]:
    """Powers of the time, of which trials choose one."""
    return TIME_POWERS if columns > MAX_DIMENSIONS_OF_ONE_POWER else TIME_POWERS[:1]


def take_turns(runs: list[Training], phase: Phase, limits: Limits) -> None:
    """Train all of them up to the limits, a block of steps each at a time, and validate."""
    keys = jax.random.split(phase.key, len(runs))[1:]
    phases = [phase, *(phase._replace(key=key) for key in keys)]
    going = list(zip(runs, phases, strict=True))
    while going:
        for run, own in going:
            run.train(own, limits, STEPS_PER_BLOCK if len(going) > 1 else math.inf)
        going = [(run, own) for run, own in going if not run.ended]
    for run in runs:
        run.validate_again()


@dataclasses.dataclass
class Candidates:
    """Trainings that compete. Trials leave one."""

    runs: list[Training]
    start: Callable[[Density], Training]
    """Begins the training of a density with another map."""
    phases: list[Phase]
    """Matching at each power of the time."""
    limits: Limits

    @property
    def best(self) -> Training:
        """The one with the best validation."""
        return min(self.runs, key=lambda run: run.best_nll)

    def choose(self, others: Iterator[Density], count: int) -> Training:
        """Try the first map against `count` others, then the powers of the time."""
        powers = len(self.phases) - 1
        if self.limits.seconds < math.inf and (count or powers):
            # To know how long steps and validations take.
            self._advance(self.runs[0], self.phases[0], STEPS_PER_BLOCK)
        if steps := self._round_steps(count):
            self._try_maps(map(self.start, others), steps)
        if steps := self._round_steps(powers):
            self._try_powers(steps)
        (run,) = self.runs
        return run

    def validate(self) -> None:
        """Validate what came after the last validation of each."""
        for run in self.runs:
            run.validate_again()

    def _round_steps(self, others: int) -> int:
        """Steps of a round, or zero if the trial leaves too few to the training itself."""
        (run,) = self.runs
        in_time = run.clock.steps_remaining(self.limits)
        total = min(self.limits.steps, in_time)
        steps = int(max(ROUND_PART * total, min(MIN_ROUND_STEPS, 4 * ROUND_PART * total)))
        validations = ROUNDS * (others + 1) * run.validation_seconds / run.clock.step
        left = min(self.limits.steps, in_time - ROUNDS * steps * others - validations)
        return steps if others and left >= MIN_REMAINING_STEPS else 0

    def _try_maps(self, others: Iterable[Training], steps: int) -> None:
        """Leave the best of all maps after rounds of so many steps."""
        self.runs += others
        for i in range(1, ROUNDS + 1):
            for run in self.runs:
                self._advance(run, self.phases[0], i * steps)
            enough = self.best.best_nll + BEHIND_NATS
            self.runs[:] = [run for run in self.runs if run.best_nll <= enough]
            if len(self.runs) == 1:
                return
        self.runs[:] = [self.best]

    def _try_powers(self, steps: int) -> None:
        """Leave the first power, unless the other one is clearly better."""
        self.runs.append(self.start(self.runs[0].density))
        for run, phase in zip(self.runs, self.phases, strict=True):
            self._advance(run, phase, ROUNDS * steps)
        first, second = self.runs
        # Early on uniform times often look a little better, and are worse later.
        del self.runs[0 if second.best_nll < first.best_nll - CLEARLY_BETTER_NATS else 1]

    def _advance(self, run: Training, phase: Phase, until: int) -> None:
        """Train up to a step, and validate."""
        reached = run.step if run.phase else 0
        run.train(phase, self.limits, until - reached)
        run.validate_again()
