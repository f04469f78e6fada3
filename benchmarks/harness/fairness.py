"""What makes a comparison fair. Every benchmark takes its times and its errors from here.

- Contenders get the same weights, data and probe; their mathematics is compared in float64 first.
- They take turns in one process, in another order each round, with a pause in between for the
  thread pool of the one before to fall asleep. The first call is not among the times.
- A turn is a call, or the median of as many as take 20 ms: training steps follow each other, and
  the first millisecond after a pause is one of cold caches.
- Times are medians with minimum and maximum; a ratio is the median of the ratios of each round.
- Two contenders are compared at equal error, of the gradient or in nats, on their work-precision
  curves: between the last tolerance that does not reach it and the first that does, linear in
  logarithms. Those two are measured in each round, looser ones once.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

PAUSE, TURN = 0.003, 0.02  # seconds between two turns, and the least that a turn takes
EXACT = 1e-9  # tolerance of exact gradients, by Dopri8 in float64: their errors are below 1e-8


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def doubled(tree: Any) -> Any:
    """The same numbers in float64; call it within `double_precision`."""
    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    cast = lambda leaf: jnp.asarray(leaf, jnp.float64) if floating(leaf) else leaf
    return jax.tree.map(cast, tree)


def check_equal(values: Mapping[str, Any], relative: float = 1e-12) -> None:
    """Raise unless the float64 arrays of all contenders are equal to rounding."""
    (first, expected), *others = ((name, np.asarray(value)) for name, value in values.items())
    for name, value in others:
        if value.dtype != np.float64 or expected.dtype != np.float64:
            raise TypeError(f"{first} and {name} must be float64 to be compared")
        error = np.abs(value - expected).max() / np.abs(expected).max()
        if not error <= relative:
            raise AssertionError(f"{name} differs from {first} by {error:.1e}, relative")


def gradient_error(gradient: Sequence[Any], reference: Sequence[np.ndarray]) -> float:
    """`|gradient - reference| / |reference|`, over all leaves together."""
    pairs = [
        (np.asarray(g, np.float64), np.asarray(r)) for g, r in zip(gradient, reference, strict=True)
    ]
    if any(g.shape != r.shape for g, r in pairs):
        raise ValueError(f"shapes {[(g.shape, r.shape) for g, r in pairs]} differ")
    squares = sum(((g - r) ** 2).sum() for g, r in pairs)
    return float(np.sqrt(squares / sum((r**2).sum() for _, r in pairs)))


def nats_error(log_prob: Sequence[Any], reference: Sequence[np.ndarray]) -> float:
    """The root mean square error of log-densities, over as many rows as the reference has."""
    (found,), (exact,) = log_prob, reference
    difference = np.asarray(found, np.float64)[: len(exact)] - exact
    return float(np.sqrt(np.mean(difference**2)))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the result of a call is there, and the result."""
    start = time.perf_counter()
    value = jax.block_until_ready(call())
    return time.perf_counter() - start, value


def alternate(
    calls: Mapping[Any, Callable[[], Any]],
    seconds: float,
    least: int = 5,
    most: int = 30,
    turn: float = TURN,
) -> dict[Any, list[float]]:
    """Times of each call, round by round, until `seconds` are over. All must have run before."""
    times = {name: [] for name in calls}
    names, start = list(calls), time.perf_counter()
    for count in range(most):
        if count >= least and time.perf_counter() - start > seconds:
            break
        shift = count % len(names)
        for name in names[shift:] + names[:shift]:
            time.sleep(PAUSE)
            taken = [timed(calls[name])[0]]
            while sum(taken) < turn:
                taken.append(timed(calls[name])[0])
            times[name].append(float(np.median(taken)))
    return times


def summary(times: ArrayLike) -> dict[str, float]:
    times = np.asarray(times, float)
    return {
        "median": float(np.median(times)), "min": float(np.min(times)), "max": float(np.max(times)),
        "rounds": times.size,
    }  # fmt: skip


def ratio(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Median over the rounds of our time over theirs."""
    return float(np.median(np.asarray(ours) / np.asarray(theirs)))


class AtError(NamedTuple):
    """The place of a contender's work-precision curve at a given error."""

    times: np.ndarray | None
    """Time in each round; None if no measured point is that accurate."""
    note: str
    """Empty when the error lies between two measured points; else what is meant instead."""


def at_error(errors: Sequence[float], times: Sequence[Sequence[float]], target: float) -> AtError:
    """The time at which a contender reaches the error `target`; `times` is [points, rounds].

    Linear in logarithms between the measured points that no other beats in both error and median
    time. Never beyond them: a curve that is more accurate everywhere counts with its fastest point.
    """
    medians = [np.median(row) for row in times]
    best: list[int] = []
    for i in np.lexsort((medians, errors)):
        if not best or medians[i] < medians[best[-1]]:
            best.append(int(i))
    if not best or errors[best[0]] > target:
        return AtError(None, "not as accurate")
    if errors[best[-1]] <= target:
        note = "" if errors[best[-1]] == target else "more accurate"
        return AtError(np.asarray(times[best[-1]]), note)
    after = next(i for i, point in enumerate(best) if errors[point] > target)
    low, high = best[after - 1], best[after]
    weight = np.log(target / errors[low]) / np.log(errors[high] / errors[low])
    logs = (1 - weight) * np.log(times[low]) + weight * np.log(times[high])
    return AtError(np.exp(logs), "")


Step = Callable[[float], tuple[Any, Sequence[Any]]]
"""A training step at a tolerance: the loss, and the leaves of the gradient. Or another result, and
None in place of the loss."""


class Bench(NamedTuple):
    """What the runner tells a benchmark, and how it hears from it."""

    seconds: float
    """Time for the alternated calls of one case."""
    skip: Mapping[str, str] = {}
    """Contenders that ended the process before, and how."""
    announce: Callable[[str], None] = lambda name: None
    """Called with the name of the contender that is next."""


def attempt(bench: Bench, failed: dict[str, str], name: str, call: Callable[[], Any]) -> Any:
    """The result of a call, or None, with the reason in `failed`: the others carry on."""
    if name in bench.skip:
        failed[name] = bench.skip[name]
        return None
    bench.announce(name)
    try:
        return call()
    except Exception as error:
        first_line = (str(error).strip() or "no message").splitlines()[0]
        failed[name] = f"{type(error).__name__}: {first_line}"[:300]
        return None


def alternate_working(
    bench: Bench, failed: dict[str, str], calls: Mapping[str, Callable[[], Any]], **rounds: int
) -> dict[str, list[float]]:
    """Times of the calls whose first one, which does not count, did not fail."""
    working = {
        name: call
        for name, call in calls.items()
        if attempt(bench, failed, name, lambda c=call: timed(c))
    }
    bench.announce("timing all")
    return alternate(working, bench.seconds, **rounds)


def check_same(failed: dict[str, str], name: str, check: Callable[[], None]) -> None:
    """Check before timing that all libraries compute the same; one that is missing is recorded.

    A difference ends the case: its times would mean nothing.
    """
    try:
        check()
    except ImportError as error:
        failed[name] = f"{type(error).__name__}: {error}"


class JaxStep:
    """A step from `loss(params, ..., tolerance)`; `static` if the compiler knows the tolerance."""

    def __init__(self, loss: Callable[..., Any], *args: Any, static: bool = False):
        static_argnums = len(args) if static else ()
        self.args = args
        self.program = jax.jit(jax.value_and_grad(loss), static_argnums=static_argnums)

    def __call__(self, tolerance):
        value, gradient = self.program(*self.args, tolerance)
        return value, jax.tree.leaves(gradient)

    def temporary_bytes(self, tolerance) -> int:
        return temporary_bytes(self.program, *self.args, tolerance)


def temporary_bytes(program: Any, *args: Any) -> int:
    """What the compiler allots for a function from `jax.jit`."""
    analysis = program.lower(*args).compile().memory_analysis()
    if analysis is None:
        raise NotImplementedError("this backend does not analyze memory")
    return int(analysis.temp_size_in_bytes)


def exact_gradient(make: Callable[[Any], Step], problem: Any) -> list[np.ndarray]:
    """The gradient in float64 of a step by Dopri8 that `make(problem)` makes."""
    with double_precision():
        return [np.asarray(leaf) for leaf in make(doubled(problem))(EXACT)[1]]


def work_precision(
    bench: Bench,
    makers: Mapping[str, Callable[[], Step]],
    exact: Sequence[np.ndarray],
    tolerances: Sequence[float],
    target: float,
    groups: Mapping[str, Sequence[str]],
    error_of: Callable[[Sequence[Any], Sequence[np.ndarray]], float] = gradient_error,
) -> dict[str, Any]:
    """Error and time of each contender at each tolerance, and their times at equal error.

    Args:
        exact: the leaves of the exact gradient, or of what else `error_of` compares.
        tolerances: from loose to tight. A contender ends with the first that reaches `target`.
        target: the error at which times are compared.
        groups: peers by name of group. For each, the ratio of jaxode to its fastest member.
    """
    failed, calls, errors = {}, {}, {}
    for name, make in makers.items():
        step = attempt(bench, failed, name, make)
        if step is None:
            continue
        for tolerance in tolerances:
            call = lambda step=step, tolerance=tolerance: step(tolerance)
            outcome = attempt(bench, failed, name, lambda call=call: jax.block_until_ready(call()))
            if outcome is None:
                break
            _, found = outcome
            error = error_of(found, exact)
            if np.isfinite(error):
                calls[name, tolerance], errors[name, tolerance] = call, error
            if error <= target:
                break
        if name not in failed and not any(key[0] == name for key in calls):
            failed[name] = "the result is not finite"
    bench.announce("timing all")
    by_name = {name: [key for key in calls if key[0] == name] for name, _ in calls}
    around = {key: calls[key] for keys in by_name.values() for key in keys[-2:]}
    once = {key: [timed(call)[0]] for key, call in calls.items() if key not in around}
    times = once | alternate(around, bench.seconds, least=3)
    groups = {"all peers": [n for n in makers if not n.startswith("jaxode")], **groups}
    places, curves = {}, {}
    for name, keys in by_name.items():
        last = keys[-2:]
        places[name] = at_error([errors[k] for k in last], [times[k] for k in last], target)
        curves[name] = [{"tolerance": k[1], "error": errors[k], **summary(times[k])} for k in keys]
    found = compared(places, groups)
    return {"target_error": target, "failed": failed, "curves": curves, **found}


def compared(
    places: Mapping[str, AtError], groups: Mapping[str, Sequence[str]], ours: str = "jaxode"
) -> dict[str, dict[str, Any]]:
    """Times at the error as `at_target`; `ratios` and `best` by group: our time over the time of
    the fastest peer that is accurate."""
    reached = {name: place.times for name, place in places.items() if place.times is not None}
    ratios, best = {}, {}
    for group, names in groups.items():
        peers = [name for name in names if name in reached]
        if ours in reached and peers:
            best[group] = min(peers, key=lambda name: float(np.median(reached[name])))
            ratios[group] = ratio(reached[ours], reached[best[group]])
    times = lambda name: summary(reached[name]) if name in reached else {}
    at_target = {name: {**times(name), "note": place.note} for name, place in places.items()}
    return {"at_target": at_target, "ratios": ratios, "best": best}
