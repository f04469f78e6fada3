"""Trials of maps and powers of the time, from which `fit` chooses."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from jaxode.density.density import Density
from jaxode.training.budget import Budget
from jaxode.training.loop import Training
from jaxode.training.steps import STEPS_PER_BLOCK, Phase

TIME_POWERS = 2.0, 1.0  # of `matching_loss`, in the order in which they are tried
MAX_DIMENSIONS_OF_ONE_POWER = 16  # up to which only the first power is tried
TRIAL_ROUNDS = 2
# A round takes this part of the training, but at least so many steps, or four such parts if these
# are fewer.
ROUND_PART = 0.025
MIN_ROUND_STEPS = 250
MIN_REMAINING_STEPS = 1000  # a trial that leaves fewer to the training itself is left out
BEHIND_NATS = 0.2  # drop maps that are so far behind the best after a round
CLEARLY_BETTER_NATS = 0.2  # take uniform times if they are better by this


def powers_to_try(columns: int) -> tuple[float, ...]:
    """The powers of the time among which trials choose."""
    return TIME_POWERS if columns > MAX_DIMENSIONS_OF_ONE_POWER else TIME_POWERS[:1]


@dataclasses.dataclass
class Candidates:
    """Trainings that compete in trials, until one is left."""

    runs: list[Training]
    start: Callable[[Density], Training]
    """Begins the training of a density with another map."""
    phases: list[Phase]
    """Matching at each power of the time."""
    budget: Budget

    @property
    def best(self) -> Training:
        """The training with the best validation."""
        return min(self.runs, key=lambda run: run.best_nll)

    def choose(self, other_maps: Iterator[Density], count: int) -> Training:
        """Try the first map against `count` other maps, then the powers of the time."""
        powers = len(self.phases) - 1
        if self.budget.timed and (count or powers):
            # Measure how long steps and validations take.
            self._advance(self.runs[0], self.phases[0], STEPS_PER_BLOCK)
        if steps := self._round_steps(count):
            self._try_maps(map(self.start, other_maps), steps)
        if steps := self._round_steps(powers):
            self._try_powers(steps)
        (run,) = self.runs
        return run

    def validate(self) -> None:
        """Validate the steps of each run since its last validation."""
        for run in self.runs:
            run.validate_again()

    def _round_steps(self, rivals: int) -> int:
        """Steps of a round, or zero if the trial leaves too few to the training itself."""
        (run,) = self.runs
        in_time = run.steps_in_time
        total = min(self.budget.steps, in_time)
        steps = int(max(ROUND_PART * total, min(MIN_ROUND_STEPS, 4 * ROUND_PART * total)))
        in_steps = run.seconds_per_validation / run.seconds_per_step
        validations = TRIAL_ROUNDS * (rivals + 1) * in_steps
        left = min(self.budget.steps, in_time - TRIAL_ROUNDS * steps * rivals - validations)
        return steps if rivals and left >= MIN_REMAINING_STEPS else 0

    def _try_maps(self, rivals: Iterable[Training], steps: int) -> None:
        """Leave the best of all maps after rounds of so many steps."""
        self.runs += rivals
        for i in range(1, TRIAL_ROUNDS + 1):
            for run in self.runs:
                self._advance(run, self.phases[0], i * steps)
            enough = self.best.best_nll + BEHIND_NATS
            self.runs[:] = [run for run in self.runs if run.best_nll <= enough]
            if len(self.runs) == 1:
                return
        self.runs[:] = [self.best]

    def _try_powers(self, steps: int) -> None:
        """Leave the first power, unless the other one is clearly better."""
        self.runs.append(self.start(self.runs[0].model))
        for run, phase in zip(self.runs, self.phases, strict=True):
            self._advance(run, phase, TRIAL_ROUNDS * steps)
        first, second = self.runs
        # Early on uniform times often look a little better, and are worse later.
        del self.runs[0 if second.best_nll < first.best_nll - CLEARLY_BETTER_NATS else 1]

    def _advance(self, run: Training, phase: Phase, until: int) -> None:
        """Train up to a step, and validate."""
        reached = run.step if run.phase else 0
        run.train(phase, self.budget, until - reached)
        run.validate_again()
