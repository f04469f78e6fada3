"""When a phase of a training ends, how large its steps are, and when a validation is due."""

import math
from typing import NamedTuple

from jaxode.training.budget import Budget

FIRST_VALIDATION_PASSES = 64  # over the rows, after which the first validation is due
FIRST_VALIDATION_STEPS = 100, 500  # bounds of the step of the first validation
VALIDATION_STEP_RATIO = 1.3  # of the steps at one validation to those at the last one
# If time is limited, a validation is due after so many seconds, and none before so many times as
# long as one takes.
SECONDS_PER_VALIDATION = 10.0
VALIDATION_TIME_RATIO = 4.0


class Resumed(NamedTuple):
    """Where a training went back to, to end after as many steps again."""

    step: int
    part: float
    """The part of the phase that was left there."""


class Schedule(NamedTuple):
    """The limits of a phase."""

    budget: Budget
    began: float
    """Seconds of the stopwatch when the phase began."""
    first_validation: float
    """The step of the first validation."""
    resumed: Resumed | None = None

    def part_left(self, step: int) -> float:
        """The part of the phase that is left after a step, from one to zero."""
        budget, of_time = self.budget, 1.0
        if budget.over:
            return 0.0
        if budget.timed:
            of_time = budget.seconds_left / (budget.seconds - self.began)
        of_steps = 1 - step / budget.steps
        if self.resumed is not None:
            best, part = self.resumed
            of_steps = min(of_steps, part * (2 - step / best) if best else 0.0)
        return min(of_steps, of_time)

    def validation_after(self, step: int) -> float:
        """The step of the validation after one at `step`."""
        return max(self.first_validation, VALIDATION_STEP_RATIO * step)

    def is_due(self, step: int, next_step: float, since: float, seconds: float) -> bool:
        """Whether to validate.

        Args:
            step: the steps so far.
            next_step: the step of the next validation.
            since: seconds since the last validation.
            seconds: that it took.
        """
        timed = self.budget.timed
        due = step >= min(next_step, self.budget.steps) or (
            timed and since > SECONDS_PER_VALIDATION
        )
        return due and not (timed and since < VALIDATION_TIME_RATIO * seconds)


def first_validation(rows: int, batch_size: int) -> float:
    """The step of the first validation. A few hundred rows are overfitted within 500 steps."""
    least, most = FIRST_VALIDATION_STEPS
    return min(max(FIRST_VALIDATION_PASSES * rows / batch_size, least), most)


def size_of_steps(part: float) -> float:
    """The part of the full rate at which to train when this part of the phase is left."""
    return math.sin(0.5 * math.pi * part) ** 2
