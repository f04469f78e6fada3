"""Trainings that take turns, and what is kept of them when they end."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import jax

from jaxode.training.budget import Budget
from jaxode.training.loop import Training
from jaxode.training.steps import STEPS_PER_BLOCK, Phase
from jaxode.training.validations import Point


def take_turns(runs: list[Training], phase: Phase, budget: Budget) -> None:
    """Train all runs up to the limits, in turns of a block of steps, and validate them."""
    keys = jax.random.split(phase.key, len(runs))[1:]
    phases = [phase, *(phase._replace(key=key) for key in keys)]
    going = list(zip(runs, phases, strict=True))
    while going:
        for run, phase_of_run in going:
            run.train(phase_of_run, budget, STEPS_PER_BLOCK if len(going) > 1 else math.inf)
        going = [(run, phase_of_run) for run, phase_of_run in going if not run.ended]
    for run in runs:
        run.validate_again()


@contextlib.contextmanager
def keeping_the_best(runs: list[Training], budget: Budget) -> Iterator[None]:
    """End the trainings of a list at Ctrl-C, and keep the best of each so far.

    Raises KeyboardInterrupt unless a validation was finite.
    """
    with budget.until_interrupted():
        yield
    if budget.interrupted:
        # Other processes may be at another step.
        if not any(run.plan.devices.several_processes for run in runs):
            for run in runs:
                run.validate_again()
        if all(run.best_nll == math.inf for run in runs):
            raise KeyboardInterrupt
    budget.finish()


def with_finite_best(runs: Sequence[Training], message: str) -> list[Training]:
    """The trainings with a finite validation: an interrupt may come before the first of some.

    Raises FloatingPointError with a message if there is none.
    """
    finite = [run for run in runs if run.best_nll < math.inf]
    if not finite:
        raise FloatingPointError(message)
    return finite


def points_of_all(runs: Sequence[Training]) -> list[Point]:
    """The validations of all networks in order, each as the mean of the latest ones."""
    if len(runs) == 1:
        return runs[0].points
    last, together = {}, []
    by_time = sorted(
        (point.seconds, i, point) for i, run in enumerate(runs) for point in run.points
    )
    for _, i, point in by_time:
        last[i] = point.nats
        if len(last) == len(runs):
            together.append(point._replace(nats=sum(last.values()) / len(last)))
    return together
