"""Estimate the parameters of 200 forced systems from irregular readings, with standard errors.

    python examples/forced.py

200 rooms with air and walls, each heated by a record of its own: 30 times at which the power was
written down, linear in between. The air is read at 25 irregular times, with noise. One solve takes
all rooms, each with its own input, breakpoints and times of readings. `jaxode.estimate` finds the
three parameters that all rooms share, from a guess that is three times off, and standard errors.
Prints the estimates, the difference to SciPy, which solves one room after the other, and what
breakpoints at the knots cost and gain. A minute on two cores.
"""

import itertools
import time

import diffrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common.arguments import announce, count, parser, run
from common.pictures import save
from scipy.integrate import solve_ivp

import jaxode

KNOTS, READINGS, SPAN, NOISE = 30, 25, 10.0, 0.05
NAMES = ("loss through walls", "air to wall", "gain of the heater")
TRUE = jnp.array([0.3, 1.2, 2.0])


def room(t, temperature, args):
    """Air and wall, above the temperature outside."""
    log_parameters, power = args  # shared, and of this room
    loss, exchange, gain = jnp.exp(log_parameters)
    air, wall = temperature
    to_wall = exchange * (air - wall)
    return jnp.stack([gain * power.evaluate(t) - to_wall, 0.3 * to_wall - loss * wall])


def records(key, rooms: int):
    """Knots `[rooms, knots]`, powers, and times of readings `[rooms, readings]`."""
    knot_key, power_key, time_key = jax.random.split(key, 3)
    inner = jnp.sort(jax.random.uniform(knot_key, (rooms, KNOTS - 2), maxval=SPAN))
    ends = jnp.zeros((rooms, 1)), jnp.full((rooms, 1), SPAN)
    knots = jnp.concatenate([ends[0], inner, ends[1]], axis=1)
    power = jax.random.uniform(power_key, knots.shape)
    times = jnp.sort(jax.random.uniform(time_key, (rooms, READINGS), maxval=SPAN))
    return knots, power, times


def solve(log_parameters, data, kinks=True, **options):
    """All rooms, with outputs at the times of their readings."""
    knots, power, times = data
    inputs = jax.vmap(diffrax.LinearInterpolation)(knots, power)
    return jaxode.solve(
        room, jnp.zeros((len(knots), 2)), 0.0, SPAN, log_parameters, row_args=inputs, ts=times,
        batch="per_sample", breakpoints=knots if kinks else None, max_steps=512, **options,
    )  # fmt: skip


def airs(log_parameters, data, **options):
    """The air at the times of the readings of each room."""
    return solve(log_parameters, data, **options).ys[..., 0]


def estimate(data, readings):
    """The logarithms of the parameters, from a guess three times off."""
    knots, power, times = data
    inputs = jax.vmap(diffrax.LinearInterpolation)(knots, power)
    guess = jnp.log(TRUE) + jnp.log(jnp.array([3.0, 1 / 3, 3.0]))
    return jaxode.estimate(
        room, jnp.zeros((len(knots), 2)), times, readings, guess[None], row_args=inputs,
        observe=lambda t, y, args: y[0], breakpoints=knots, max_steps=512,
    )  # fmt: skip


def by_scipy(parameters, knots, power, times):
    """One room, piece by piece between the knots of its input."""
    loss, exchange, gain = map(float, parameters)

    def field(t, y):
        to_wall = exchange * (y[0] - y[1])
        return gain * np.interp(t, knots, power) - to_wall, 0.3 * to_wall - loss * y[1]

    y, found = np.zeros(2), []
    for start, end in itertools.pairwise(knots):
        piece = solve_ivp(field, (start, end), y, rtol=1e-8, atol=1e-8, dense_output=True)
        inside = times[(times > start) & (times <= end)]
        if len(inside):
            found.extend(piece.sol(inside)[0])
        y = piece.y[:, -1]
    return np.array(found)


def compare(data, rooms: int):
    """Prints the difference to SciPy for some rooms, and how long both take for one."""
    ours, own = timed(lambda p: airs(p, data, rtol=1e-8, atol=1e-8))
    own /= len(ours)
    begin = time.perf_counter()
    theirs = [by_scipy(TRUE, *(np.asarray(part[i]) for part in data)) for i in range(rooms)]
    other = (time.perf_counter() - begin) / rooms
    apart = np.max(np.abs(np.stack(theirs) - ours[:rooms]))
    print(f"largest difference to SciPy {apart:.1e}")
    print(f"milliseconds a room: jaxode {1e3 * own:.2f}, SciPy {1e3 * other:.1f}", flush=True)
    print("at a tolerance of 1e-5        error    steps  milliseconds of a solve, of its gradient")
    for name, kinks in (("without breakpoints", False), ("breakpoints=knots", True)):
        solution, seconds = timed(lambda p, kinks=kinks: solve(p, data, kinks))
        _, of_gradient = timed(jax.grad(lambda p, kinks=kinks: airs(p, data, kinks=kinks).sum()))
        error = np.max(np.abs(solution.ys[..., 0] - ours))
        steps = np.mean(solution.stats.num_steps)
        row = f"  {name:26s} {error:.1e} {steps:7.0f}"
        print(f"{row} {1e3 * seconds:8.0f} {1e3 * of_gradient:8.0f}", flush=True)


def timed(of_parameters):
    """The value at the truth, and the seconds of a second call."""
    compiled = jax.jit(of_parameters)
    value = jax.block_until_ready(compiled(jnp.log(TRUE)))
    begin = time.perf_counter()
    jax.block_until_ready(compiled(jnp.log(TRUE)))
    return value, time.perf_counter() - begin


def draw(data, readings, found, path):
    knots, power, times = data
    figure, axes = plt.subplots(2, 3, figsize=(13, 6), sharex=True, constrained_layout=True)
    fine = jnp.broadcast_to(jnp.linspace(0.0, SPAN, 200), (len(knots), 200))
    curves = airs(found, (knots, power, fine))
    for i, (top, bottom) in enumerate(axes.T):
        top.plot(knots[i], power[i], ".-", color="tab:orange")
        bottom.plot(fine[i], curves[i], color="tab:red", label="fitted")
        bottom.plot(times[i], readings[i], ".", color="gray", label="readings")
        top.set_title(f"room {i + 1}")
        bottom.set_xlabel("time")
    axes[0, 0].set_ylabel("power, recorded")
    axes[1, 0].set_ylabel("air")
    axes[1, 0].legend()
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__)
    known.add_argument("--rooms", type=count, default=200, help="at least 3 (default 200)")
    options = known.parse_args(arguments)
    if options.rooms < 3:
        known.error("--rooms must be at least 3")
    announce(__doc__)
    with jax.enable_x64(True):
        key, noise_key = jax.random.split(jax.random.key(options.seed))
        data = records(key, options.rooms)
        exact = airs(jnp.log(TRUE), data)
        readings = exact + NOISE * jax.random.normal(noise_key, exact.shape)
        compare(data, min(options.rooms, 20))
        begin = time.perf_counter()
        fitted = estimate(data, readings)
        found, errors = fitted.params, np.exp(fitted.params) * fitted.errors
        print(f"estimates after {time.perf_counter() - begin:.1f} s, with standard errors")
        for name, value, error, true in zip(NAMES, np.exp(found), errors, TRUE, strict=True):
            print(f"  {name:20s} {value:.4f} +- {error:.4f}, true {true:.1f}")
        draw(data, readings, found, options.out)
    return 0


if __name__ == "__main__":
    run(main)
