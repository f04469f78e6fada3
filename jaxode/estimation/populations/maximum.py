"""The largest likelihood of a population, and the covariance there."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxode.estimation.observed.bounds import Bounds
from jaxode.estimation.populations.marginal import (
    DAMPING_CUT,
    DAMPING_GROWTH,
    FIRST_DAMPING,
    Population,
    evaluated,
    secant,
)
from jaxode.estimation.search.levenberg_marquardt import MOST_STEPS
from jaxode.training.budget import Budget


@dataclasses.dataclass(frozen=True)
class PopulationLimits:
    """When the searches of a population end, how far they step, and what is undetermined.

    Distances are in standard errors, by the information on all parameters, or in the units of
    parameters, which `PopulationLikelihood` chooses.
    """

    scoring_distance: float = 0.03
    """Scoring ends when the best parameters are nearer than so many standard errors."""
    shortest_step: float = 1e-4
    """Scoring ends when a step of fewer standard errors fails."""
    newton_steps: int = 5
    """The largest number of Newton's steps with one Hessian."""
    newton_distance: float = 1e-3
    """Newton's method has converged when the best parameters are nearer than so many standard
    errors."""
    difference: float = 0.01
    """The step of the differences of gradients, in conditional standard errors, or in units if
    these are shorter."""
    subjects_at_once: int = 50
    """The largest number of subjects that one call of the program evaluates."""
    least_damping: float = 1e-6
    """Floor of the damping, so that a few steps that fail raise it enough."""
    good_gain: float = 0.75
    """Cut the damping after a step that brought more than this part of its promised gain."""
    poor_gain: float = 0.25
    """Raise the damping after a step that brought less than this part of its promised gain."""
    flat_curvature: float = 1e-6
    """A direction is flat if its curvature, in the units of the parameters, is below this."""
    widest_unit: float = 100.0
    """Cap a parameter's unit at 100 conditional standard errors, those with the others fixed."""
    deviations_in_unit: float = 5.0
    """The unit of a parameter that varies is so many of its first guessed deviations."""
    hidden_part: float = 0.1
    """A parameter is undetermined if flat directions could hide over 10% of its known variance."""
    least_information: float = 1e-6
    """Floor of the information on a parameter, in its unit, where it scales steps."""


LIMITS = PopulationLimits()


class Total(NamedTuple):
    """Summed likelihood of some subjects, with gradient and expected Hessian."""

    values: np.ndarray
    """Minus the log-likelihood of each subject."""
    scores: np.ndarray
    """The gradient of their sum."""
    information: np.ndarray
    """The expected Hessian of their sum, approximately."""

    def of_parameters(self, mask: Bool[np.ndarray, " p"]) -> "Total":
        """The same for the parameters in the mask, where the others are held."""
        return Total(self.values, self.scores[mask], self.information[np.ix_(mask, mask)])

    @property
    def usable(self) -> bool:
        """Whether a search can go on from here."""
        return bool(np.isfinite(self.scores).all() and np.isfinite(self.information).all())

    @property
    def value(self) -> float:
        return float(self.values.sum())

    def decrement(self, units: np.ndarray) -> float:
        """The distance to the best parameters, in standard errors."""
        return float(np.sqrt(self.scores @ np.linalg.solve(self.damped(1e-9, units), self.scores)))

    def damped(self, damping: float, units: np.ndarray) -> np.ndarray:
        """The information with `damping` times its diagonal added."""
        scale = np.maximum(np.diag(self.information), LIMITS.least_information / units**2)
        return self.information + damping * np.diag(scale)


class Maximum(NamedTuple):
    """Where the search of a population ends."""

    theta: np.ndarray
    nll: float
    covariance: np.ndarray
    """NaN for undetermined parameters."""
    converged: bool
    undetermined: np.ndarray
    """Which parameters the observations do not determine."""
    at_bound: Bool[np.ndarray, " p"]
    """Which parameters are held at a bound, or fixed by equal ones."""
    movable: Bool[np.ndarray, " p"]
    """Which parameters no equal bounds fix."""


class PopulationLikelihood:
    """The likelihood of a population, evaluated chunk by chunk of its subjects.

    One program serves all chunks. Subjects that take long delay few others, and the first chunk is
    a small population that starts the search. The search for the effects of a subject begins where
    their derivatives at the last parameters point.
    """

    least_units: Any = 1.0
    """The unit of each parameter where it is near zero. Elsewhere it is its size."""
    sized: Any = True
    """Whether the size of a parameter may be its unit. That of the logarithm of the noise may
    not."""

    lower: Any = -np.inf
    """Lower bounds of the parameters."""
    upper: Any = np.inf
    """Upper bounds of the parameters."""

    def __init__(
        self,
        population: Population,
        theta: np.ndarray,
        bounds: Bounds | None = None,
        budget: Budget | None = None,
    ):
        n, self.budget = population.shared, budget or Budget(MOST_STEPS)
        self.lower, self.upper = np.full(len(theta), -np.inf), np.full(len(theta), np.inf)
        if bounds is not None:
            self.lower[:n], self.upper[:n] = map(np.asarray, bounds)
        count, q = len(population.subjects.ts), len(population.places)
        chunks = -(-count // LIMITS.subjects_at_once)
        size = -(-count // chunks)
        self.population = population
        self.subjects_of_chunk = [np.arange(chunk, count, chunks) for chunk in range(chunks)]
        self.chunks = []
        for subjects in self.subjects_of_chunk:
            padded = np.resize(subjects, size)
            data = jax.tree.map(lambda x, rows=padded: x[rows], population.subjects)
            self.chunks.append(eqx.tree_at(lambda p: p.subjects, population, data))
        dtype = population.t0.dtype
        zeros = jnp.zeros((size, q), dtype), jnp.zeros((size, q, len(theta)), dtype)
        self.last = [(theta, *zeros)] * chunks
        """For each chunk the last parameters, the effects there and their derivatives."""

    def units(self, theta: np.ndarray) -> np.ndarray:
        """The unit of each parameter."""
        return np.maximum(np.where(self.sized, np.abs(theta), 0.0), self.least_units)

    def take_units(self, theta: np.ndarray, information: np.ndarray) -> None:
        """Choose the units by the first guess and the information there.

        A parameter that varies has a unit of its deviation. Others may be logarithms, of which a
        unit is one, but no more than 100 of their standard errors; or only these if the guess is
        zero, which says nothing about a unit.
        """
        diagonal = np.diag(information)
        n, q = self.population.shared, len(self.population.places)
        errors = LIMITS.widest_unit / np.sqrt(np.where(diagonal > 0, diagonal, np.inf))
        units = np.where(theta == 0, errors, np.minimum(errors, 1.0))
        root = self.population.split(jnp.asarray(theta))[1]
        spread = LIMITS.deviations_in_unit * np.asarray(root).diagonal()
        rows = np.tril_indices(q)[0] if self.population.correlated else np.arange(q)
        units[np.asarray(self.population.places)] = spread
        units[n : n + len(rows)] = spread[rows]
        self.sized = np.arange(len(theta)) < n + len(rows)
        units[~self.sized] = 1.0
        self.least_units = np.where((units > 0) & np.isfinite(units), units, 1.0)

    def held(self, theta: np.ndarray, scores: np.ndarray) -> Bool[np.ndarray, " p"]:
        """Which parameters a step leaves at their bound, since it would push them beyond."""
        down, up = (theta <= self.lower) & (scores > 0), (theta >= self.upper) & (scores < 0)
        return (self.lower == self.upper) | down | up

    @property
    def effects(self) -> Float[Array, "subjects q"]:
        """The likeliest effects at the last parameters."""
        chunks = zip(self.last, self.subjects_of_chunk, strict=True)
        effects = np.concatenate([padded[: len(subjects)] for (_, padded, _), subjects in chunks])
        return jnp.asarray(effects[np.argsort(np.concatenate(self.subjects_of_chunk))])

    def at(self, theta: np.ndarray, chunks: int | None = None) -> Total:
        """The likelihood of all subjects, or of those of the first `chunks`."""
        values, scores, information = [], 0.0, 0.0
        for i, subjects in enumerate(self.subjects_of_chunk[:chunks]):
            last, effects, moves = self.last[i]
            begin = effects + jnp.clip(moves @ jnp.asarray(theta - last), -1.0, 1.0)
            result = evaluated(self.chunks[i], jnp.asarray(theta), begin)
            if all(bool(jnp.isfinite(leaf).all()) for leaf in result):
                self.last[i] = theta, result.effects, result.moves
            values.append(np.asarray(result.values)[: len(subjects)])
            scores += np.asarray(result.scores)[: len(subjects)].sum(axis=0)
            information += np.asarray(result.information)[: len(subjects)].sum(axis=0)
        order = np.argsort(np.concatenate(self.subjects_of_chunk[:chunks]))
        return Total(np.concatenate(values)[order], np.asarray(scores), np.asarray(information))

    def trial(self, theta: np.ndarray, chunks: int | None = None) -> Total | None:
        """The likelihood at a trial, or None if Ctrl-C ended the budget: then the last effects are
        those before."""
        last, total = list(self.last), None
        with self.budget.until_interrupted():
            total = self.at(theta, chunks)
        if total is None:
            self.last = last
        return total

    def minimized(
        self, theta: np.ndarray, chunks: int | None = None, label: str = "estimate_population"
    ) -> np.ndarray:
        """Search for the likeliest parameters by damped Fisher scoring, within the budget.

        Gradients correct the expected Hessian, as in the search of effects. The damping follows how
        much of its promised gain a step brings. A step changes no parameter by more than its unit,
        and by less after one that fails; it ends at bounds. Lines of progress have a label, or
        are left out without one.
        """
        best, correction = self.trial(theta, chunks), np.zeros(2 * theta.shape)
        if best is None:
            return theta
        damping, longest = FIRST_DAMPING, 1.0
        for step in range(int(self.budget.steps)):
            mask, units = ~self.held(theta, best.scores), self.units(theta)
            inner = best.of_parameters(mask)
            converged = not inner.decrement(units[mask]) > LIMITS.scoring_distance
            if converged or self.budget.over:
                break
            move, hessian = _move(inner, correction[np.ix_(mask, mask)], damping, units[mask])
            along, length = np.zeros_like(theta), np.max(np.abs(move) / units[mask])
            along[mask], length = move * min(1.0, longest / length), min(length, longest)
            along = np.clip(theta + along, self.lower, self.upper) - theta
            last, trial = list(self.last), self.trial(theta + along, chunks)
            if trial is None:
                break
            if trial.usable and trial.value <= best.value:
                move = along[mask]
                promised = -(inner.scores @ move + 0.5 * move @ hessian @ move)
                gain = (best.value - trial.value) / promised
                correction = _corrected(trial, correction, along, trial.scores - best.scores)
                theta, best = theta + along, trial
                if label:
                    self.budget.show(f"{label}: step {step + 1}, nll {best.value:.6g}")
                if gain > LIMITS.good_gain:
                    damping = max(damping * DAMPING_CUT, LIMITS.least_damping)
                elif gain < LIMITS.poor_gain:
                    damping *= DAMPING_GROWTH
                longest = min(2 * longest, 1.0)
                continue
            self.last = last
            if along @ best.information @ along < LIMITS.shortest_step**2:
                break
            damping, longest = damping * DAMPING_GROWTH, length / DAMPING_GROWTH
        theta, signs = self.population.with_positive_root(theta)
        if bool((signs < 0).any()):
            for i, (last_theta, effects, moves) in enumerate(self.last[:chunks]):
                self.last[i] = last_theta, effects * signs[None], 0 * moves
        return theta

    def polished(self, theta: np.ndarray) -> Maximum:
        """Newton's method with one Hessian, or with a second one if that of the start is too far
        away. If the budget ends, what was reached, with errors by the expected Hessian."""
        maximum, last = None, list(self.last)
        if not self.budget.over:
            with self.budget.until_interrupted():
                maximum = self.by_newton(theta)
                if not (maximum.converged or np.isnan(maximum.covariance[~maximum.at_bound]).any()):
                    maximum = self.by_newton(maximum.theta)
        if maximum is None:
            self.last = last
            best = self.at(theta)
            maximum = self._maximum(theta, best, best.information, converged=False)
        self.budget.finish()
        return maximum

    def _maximum(
        self, theta: np.ndarray, best: Total, hessian: np.ndarray, converged: bool
    ) -> Maximum:
        """Where the search ends, with the covariance by a Hessian."""
        at_bound, units = self.held(theta, best.scores), self.units(theta)
        mask = ~at_bound
        covariance, undetermined = np.full_like(hessian, np.nan), np.zeros(len(theta), bool)
        determined = _covariance(hessian[np.ix_(mask, mask)], units[mask], best.scores.dtype)
        if determined is not None:
            inner, undetermined[mask] = determined
            covariance[np.ix_(mask, mask)] = inner
            covariance[undetermined] = covariance[:, undetermined] = np.nan
        return Maximum(
            theta,
            best.value,
            covariance,
            converged,
            undetermined,
            at_bound,
            self.lower < self.upper,
        )

    def by_newton(self, theta: np.ndarray) -> Maximum:
        """Newton's method with the Hessian at `theta`."""
        best, units = self.at(theta), self.units(theta)
        mask = ~self.held(theta, best.scores)
        hessian = self._hessian(theta, best, units)
        determined = _covariance(hessian[np.ix_(mask, mask)], units[mask], best.scores.dtype)
        if determined is None:
            return self._maximum(theta, best, hessian, converged=False)
        covariance, _ = determined
        for _ in range(LIMITS.newton_steps):
            trial_theta = theta.copy()
            trial_theta[mask] -= covariance @ best.scores[mask]
            trial_theta = np.clip(trial_theta, self.lower, self.upper)
            last, trial = list(self.last), self.at(trial_theta)
            # The last step of effects leaves an error of about 1e-5 in values, but not in
            # gradients.
            if not trial.value <= best.value + LIMITS.scoring_distance**2:
                self.last = last
                break
            theta, best = trial_theta, trial
            if best.scores[mask] @ covariance @ best.scores[mask] < LIMITS.newton_distance**2:
                break
        scores = best.scores[mask]
        converged = scores @ covariance @ scores < LIMITS.newton_distance**2
        return self._maximum(theta, best, hessian, bool(converged))

    def _hessian(self, theta: np.ndarray, best: Total, units: np.ndarray) -> np.ndarray:
        """The Hessian by differences of exact gradients."""
        information = np.diag(best.information)  # zero for parameters without effect
        steps = np.diag(LIMITS.difference / np.maximum(np.sqrt(information), 1 / units))
        last, rows = list(self.last), []
        for step in steps:
            rows.append((self.at(theta + step).scores - best.scores) / step.max())
            self.last = list(last)
        return (np.stack(rows) + np.stack(rows).T) / 2


def _move(
    total: Total, correction: np.ndarray, damping: float, units: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A damped step down, and the Hessian by which it was chosen: that with the correction, or
    without it if the step would lead up."""
    expected = total.damped(damping, units)
    move = -np.linalg.solve(expected + correction, total.scores)
    if total.scores @ move < 0:
        return move, total.information + correction
    return -np.linalg.solve(expected, total.scores), total.information


def _corrected(
    trial: Total, correction: np.ndarray, move: np.ndarray, change: np.ndarray
) -> np.ndarray:
    """The correction of the information of `trial` by the change of the gradient over a move."""
    vectors = (jnp.asarray(x) for x in (trial.information + correction, move, change))
    return np.asarray(secant(*vectors)) - trial.information


def _covariance(
    hessian: np.ndarray, units: np.ndarray, dtype: Any
) -> tuple[np.ndarray, Bool[np.ndarray, " p"]] | None:
    """The inverse of a Hessian without its flat directions, and which parameters are undetermined.

    None if the Hessian is not finite, or curves downwards.
    """
    if not np.isfinite(hessian).all():
        return None
    # Eigenvalues are known up to rounding of the largest: choose units in which they are alike.
    information = np.maximum(np.diag(hessian), LIMITS.least_information / units**2)
    units = np.minimum(units, LIMITS.widest_unit / np.sqrt(information))
    curvatures, along = np.linalg.eigh(hessian * np.outer(units, units))
    rounding = 100 * np.finfo(dtype).eps * curvatures.max()
    least = max(LIMITS.flat_curvature, rounding)
    if curvatures.min() < -least:
        return None
    flat = curvatures < least
    # A flat direction hides a variance of at least `1 / least`.
    hidden = (along[:, flat] ** 2).sum(axis=1) / least
    variance = (along[:, ~flat] ** 2 / curvatures[~flat]).sum(axis=1)
    along = along[:, ~flat] * units[:, None]
    return along / curvatures[~flat] @ along.T, hidden > LIMITS.hidden_part * variance
