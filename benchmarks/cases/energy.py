"""Training on an energy: path gradients, the plain gradient of the same loss, and other libraries.

The wells are those of the example `CNF_vs_OTFlow` of jflows, three double wells among unit normals:
the same Adam, rate, batch and number of steps for all, but none trains for longer than jaxode by
path gradients. The field is phi^4 theory, 64 samples a step, and others may train for twice as
long. The ring is the XY model of angles, which the others lack. Then the effective sample size, and
the acceptance of a Metropolis test whose proposals the samples are. The first call, which compiles,
does not count.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxode
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench, alternate, attempt, summary, timed
from benchmarks.harness.problems import stepper
from benchmarks.peers.energies import Contender, by_bijx, by_jflows

OURS, PLAIN = "jaxode", "jaxode, plain gradient"
WELLS, BARRIER, PLACE = 3, 1.5, 1.5
MASS, COUPLING = -4.0, 6.975  # m^2 and lambda
CHAIN = 1.0  # of the XY model, over the temperature


def wells(x):
    barriers = BARRIER * ((x[:WELLS] / PLACE) ** 2 - 1) ** 2
    return -jnp.sum(barriers) - 0.5 * jnp.sum(x[WELLS:] ** 2)


def xy(x):
    """Each angle is drawn to its neighbours on a ring."""
    return CHAIN * jnp.sum(jnp.cos(x - jnp.roll(x, 1)))


def log_z_of_xy(angles: int) -> float:
    """By the eigenvalues of the transfer matrix."""
    from scipy.special import iv

    return float(np.log(np.sum((2 * np.pi * iv(np.arange(-60, 61), CHAIN)) ** angles)))


def minus_action(y):
    neighbors = sum(jnp.roll(y, shift, axis) for axis in (0, 1) for shift in (1, -1))
    return -jnp.sum(y * (4 * y - neighbors) + MASS * y**2 + COUPLING * y**4)


def ours(flow, start, log_density, batch: int, path: bool, optimizer) -> Contender:
    def loss(m, key):
        return flow.reverse_kl_loss(m, log_density, batch, key=key, path=path)

    return Contender(start, loss, flow.sample_and_log_prob, optimizer)


def clipped_adam(steps: int) -> optax.GradientTransformation:
    """As in examples/lattice.py."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 5e-3, steps // 8, steps + 1)
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))


class Wells(NamedTuple):
    dim: int
    peers: tuple[str, ...] = ("CNF", "OTFlow")
    """Of jflows."""
    steps: int = 1000
    batch: int = 512
    width: int = 64
    samples: int = 5000
    log_density = staticmethod(wells)
    allowance = 1.0
    """Of each contender, in the seconds that the first trains for."""

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(self.dim))
        widths, adam = (self.width, self.width), optax.adam(2e-3)
        start = jaxode.nn.ConcatSquash(self.dim, widths, key=jax.random.key(0))
        make = lambda path: partial(ours, flow, start, wells, self.batch, path, adam)
        theirs = {
            f"jflows {kind}": partial(
                by_jflows, kind, wells, self.dim, self.batch, self.width, adam
            )
            for kind in self.peers
        }
        return {OURS: make(True), PLAIN: make(False), **theirs}


class Sites(NamedTuple):
    size: int
    steps: int = 500
    batch: int = 64
    samples: int = 8192
    log_density = staticmethod(minus_action)
    allowance = 2.0

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        shape = self.size, self.size
        flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(shape), rtol=1e-4, atol=1e-4)
        start = jaxode.nn.Lattice(shape, key=jax.random.key(0))
        adam = clipped_adam(self.steps)
        make = lambda path: partial(ours, flow, start, minus_action, self.batch, path, adam)
        bijx = partial(by_bijx, minus_action, shape, self.batch)
        return {OURS: make(True), PLAIN: make(False), "bijx": bijx}


class Ring(NamedTuple):
    angles: int
    steps: int = 300
    batch: int = 256
    width: int = 64
    samples: int = 8192
    log_density = staticmethod(xy)
    allowance = 1.0

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        flow = jaxode.cnf(jaxode.nn.field, jaxode.torus(self.angles), rtol=1e-4, atol=1e-4)
        key = jax.random.key(0)
        start = jaxode.nn.Residual(self.angles, self.width, 2, key=key, period=2 * math.pi)
        adam = clipped_adam(self.steps)
        make = lambda path: partial(ours, flow, start, xy, self.batch, path, adam)
        return {OURS: make(True), PLAIN: make(False)}


def trained(contender: Contender, steps: int, seconds: float) -> tuple[Any, int, float]:
    """The parameters after so many steps or seconds, the steps made, and the seconds they took."""
    step = jax.jit(stepper(contender.loss, contender.optimizer))
    params, keys = contender.start, jax.random.split(jax.random.key(1), steps)
    state = contender.optimizer.init(params)
    # Twice: what an update returns may have other types than the start.
    jax.block_until_ready(step(*step(params, state, keys[0]), keys[0]))
    start, made = time.perf_counter(), 0
    for key in keys:
        if time.perf_counter() - start > seconds:
            break
        params, state = jax.block_until_ready(step(params, state, key))
        made += 1
    return params, made, time.perf_counter() - start


@jax.jit
def acceptance(key, log_w) -> jax.Array:
    """Of a Metropolis test of independent proposals."""

    def test(current, proposal):
        log_w, u = proposal
        accept = jnp.log(u) < log_w - current
        return jnp.where(accept, log_w, current), accept

    u = jax.random.uniform(key, log_w.shape)
    return jnp.mean(jax.lax.scan(test, log_w[0], (log_w[1:], u[1:]))[1])


class Energy(Benchmark):
    title = "Training on an energy"
    cases: Mapping[str, Any] = {
        "wells in 4 dimensions": Wells(4),
        "wells in 64 dimensions": Wells(64),
        "wells in 128 dimensions": Wells(128, ("OTFlow",)),
        "phi^4 on 6 x 6": Sites(6),
        f"XY model on a ring of 8, log Z {log_z_of_xy(8):.3f}": Ring(8),
    }
    header = (
        "", "", "steps", "seconds", "effective sample size", "acceptance", "log Z, error",
        "Pareto k", "ms a step when trained",
    )  # fmt: skip

    def run(self, case: str, bench: Bench) -> Result:
        size = self.cases[case]
        failed: dict[str, str] = {}
        found: dict[str, Any] = {}
        steps, limit = {}, float("inf")

        def contend(make, limit):
            contender = make()
            params, made, seconds = trained(contender, size.steps, limit)
            x, log_q = contender.draw(params, jax.random.key(2), size.samples)
            log_w = jax.vmap(size.log_density)(x) - log_q
            report = jaxode.importance(log_w)
            names = ("ess", "log_z", "log_z_error", "pareto_k")
            told = {key: float(getattr(report, key)) for key in names}
            told |= {"steps": made, "seconds": seconds}
            told["acceptance"] = float(acceptance(jax.random.key(3), log_w))
            step = jax.jit(jax.value_and_grad(contender.loss))
            return told, partial(step, params, jax.random.key(4))

        for name, make in size.contenders().items():
            result = attempt(bench, failed, name, partial(contend, make, limit))
            if result is not None:
                found[name], call = result
                if name in (OURS, PLAIN):
                    steps[name] = call
                if name == OURS:
                    limit = size.allowance * found[name]["seconds"]
        for call in steps.values():
            timed(call)
        times = alternate(steps, bench.seconds)
        return {
            "failed": failed, "found": found, "times": {n: summary(t) for n, t in times.items()},
        }  # fmt: skip

    def rows(self, results: Results) -> Iterator[Sequence[str]]:
        for case, result in results.items():
            for name, found in result["found"].items():
                times = result["times"].get(name)
                yield (
                    case, name, str(found["steps"]), f"{found['seconds']:.1f}",
                    f"{found['ess']:.3f}", f"{found['acceptance']:.3f}",
                    f"{found['log_z']:.3f} +- {found['log_z_error']:.3f}",
                    f"{found['pareto_k']:.2f}", show.spread(times) if times else "",
                )  # fmt: skip

    def table(self, results: Results) -> str:
        return super().table(results) + "".join(map(show.failures, results.values()))

    def brief(self, results: Results) -> str:
        named = dict.fromkeys(name for result in results.values() for name in result["found"])
        cell = lambda of: f"{of['ess']:.3f}, {of['seconds']:.1f} s"
        rows = [
            [case, *(cell(result["found"][n]) if n in result["found"] else "" for n in named)]
            for case, result in results.items()
        ]
        return show.markdown(["effective sample size, time of training", *named], rows)


BENCHMARK = Energy()
