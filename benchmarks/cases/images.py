"""Flows on images of MNIST's size: training steps, log-densities with one probe, and trainings.

All contenders get a network of `jaxode.nn.Mixer`, ported to PyTorch, with the same weights. A step
of matching is one of Adam with a moving average, and draws its noise and times; the network is that
of `examples/mnist.py`. The others are compared at equal error, with a small network that was
trained, so that a case takes minutes. Pixels are random: no time of matching depends on them.

The trainings are on MNIST itself, dequantized as in `examples/mnist.py`, five minutes for each
contender, of which compilation is a part, from one seed. Those that match evaluate the moving
average of their parameters, which forgets the first ones as that of `examples/mnist.py` does. The
likelihood by diffrax gets batches of 32, so that it takes more steps, and a tolerance of 1e-3.
diffrax judges all, at 1e-4 and with the same noise and probe; torchdiffeq must find the same of
the first 100 images: their mean to 0.001 bits, each to 0.01. A Gaussian with the covariance of the
training images is beside them.
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks.cases.ffjord_step import DIFFRAX, in_torch
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Contest, Result, Results, WorkPrecision
from benchmarks.harness.fairness import (
    AtError,
    Bench,
    alternate_working,
    attempt,
    check_same,
    compared,
    nats_error,
)
from benchmarks.harness.image_data import mnist
from benchmarks.harness.problems import FlowProblem, Images, images, mixer, untrained_images
from benchmarks.peers import flows, trainers
from jaxode import images as levels

RATE = 2e-3  # of Adam
BY_TSIT5 = {name: way for name, way in DIFFRAX.items() if "Tsit5" in name}
MATCHING = {
    "jaxode": trainers.jaxode_matching,
    "torchcfm": trainers.torchcfm_matching,
    "torchcfm, torch.compile": partial(trainers.torchcfm_matching, compiled=True),
}


class Matching(Benchmark):
    """The times of a step of matching, which solves no ODE."""

    groups = {"all peers": show.peers(MATCHING), "torchcfm": show.peers(MATCHING)}

    def __init__(self, size: Images):
        self.size = size

    def run(self, case: str, bench: Bench) -> Result:
        failed: dict[str, str] = {}
        p, calls = untrained_images(self.size), {}
        check_same(failed, "the same network in PyTorch", lambda: in_torch().check_matching(p))
        batch, seeds = np.asarray(p.x)[None], np.zeros(1, int)
        for name, make in MATCHING.items():
            trainer = attempt(bench, failed, name, partial(make, p.params, self.size.dim, RATE))
            if trainer is not None:
                calls[name] = partial(trainer[0], batch, seeds)
        times = alternate_working(bench, failed, calls)
        places = {name: AtError(np.asarray(taken), "") for name, taken in times.items()}
        return {"failed": failed, **compared(places, self.groups)}

    def table(self, results: Results) -> str:
        parts = []
        for case, result in results.items():
            rows = [
                [n, show.spread(at), str(at["rounds"])] for n, at in result["at_target"].items()
            ]
            table = show.markdown(["", "ms, median (min-max)", "rounds"], rows)
            parts.append(f"**{case}**\n\n{table}{show.failures(result)}")
        return "\n\n".join(parts)


class Likelihood(WorkPrecision):
    """Value and gradient of the likelihood."""

    target = 1e-3
    groups = {
        "diffrax": [*BY_TSIT5],
        "torchdiffeq": ["torchdiffeq adjoint"],
    }

    def __init__(self, size: Images):
        self.size = size

    def contest(self, case: str) -> Contest:
        p = images(self.size)
        makers = {
            "jaxode": lambda: flows.jaxode_step(p),
            **{
                name: lambda choice=choice: flows.diffrax_step(p, *choice)
                for name, choice in BY_TSIT5.items()
            },
            "torchdiffeq adjoint": lambda: in_torch().torchdiffeq_step(p),
        }
        return Contest(makers, lambda: flows.exact(p), lambda: check(p))


class LogDensities(WorkPrecision):
    """At 0.1 nats an image, which are 0.0002 bits per dimension at MNIST's size."""

    error_of, error = "error in nats", staticmethod(nats_error)
    target = 0.1
    groups = {"diffrax": ["diffrax"], "torchdiffeq": ["torchdiffeq"]}

    def __init__(self, size: Images):
        self.size = size

    def contest(self, case: str) -> Contest:
        p = images(self.size)
        makers = {
            "jaxode": lambda: flows.jaxode_log_prob(p),
            "diffrax": lambda: flows.diffrax_log_prob(p),
            "torchdiffeq": lambda: in_torch().torchdiffeq_log_prob(p),
        }
        exact, tolerances = lambda: flows.exact_log_prob(p), (1e-2, 1e-3, 1e-4, 1e-5)
        return Contest(makers, exact, lambda: check(p), tolerances)


def check(p) -> None:
    few = jax.tree.map(lambda leaf: leaf[:2], (p.x, p.probe))
    in_torch().check_networks(p._replace(x=few[0], probe=few[1]), traced=False)


class Contender(NamedTuple):
    start: Callable[..., Any]
    """One of `trainers`."""
    batch: int = 128
    block: int = 5
    """Steps between two looks at the clock."""


TRAINED = {
    "jaxode": Contender(partial(trainers.jaxode_matching, first=10.0)),
    "torchcfm with torch.compile": Contender(
        partial(trainers.torchcfm_matching, compiled=True, first=10.0)
    ),
    "diffrax by likelihood": Contender(partial(trainers.diffrax_likelihood, tolerance=1e-3), 32, 1),
}


@jax.jit
def in_flow(key, x):
    """Images of levels as the flow sees them, about standardized, and their log-determinants."""
    u, log_det = levels.dequantize(key, x.astype(jnp.float32), 256, noise=(0,))
    y, more = levels.logit(u, 1e-4)
    return (y + 6.5) / 5.0, log_det + more - x.shape[1] * math.log(5.0)


class Training(Benchmark):
    """Bits per dimension of test images after a training."""

    def __init__(self, size: Images, seconds: float, held: int):
        self.size, self.seconds, self.held = size, seconds, held

    def run(self, case: str, bench: Bench) -> Result:
        failed: dict[str, str] = {}
        train, test = mnist()
        x, log_det = in_flow(jax.random.key(1), test[: self.held])
        probe = jax.random.rademacher(jax.random.key(2), x.shape, x.dtype)
        told = lambda log_prob: np.asarray(
            levels.bits_per_dimension(jnp.asarray(log_prob) + log_det[: len(log_prob)], x.shape[1])
        )
        of: dict[str, Any] = {
            "Gaussian": {"bits": told(gaussian(in_flow(jax.random.key(0), train)[0], x))}
        }
        for name, contender in TRAINED.items():
            found = attempt(bench, failed, name, partial(self.trained, contender, train))
            if found is None:
                continue
            problem = FlowProblem(found[0], x, probe, jax.random.key(0))
            bits = told(flows.diffrax_log_prob(problem)(1e-4)[1][0])
            if not np.isfinite(bits).all():
                failed[name] = "the result is not finite"
                continue
            of[name] = {"bits": bits, "steps": found[1], "batch": contender.batch}
            check_same(failed, f"{name} by torchdiffeq", partial(check_bits, problem, told, bits))
        for one in of.values():
            one["error"] = float(one["bits"].std() / math.sqrt(len(x)))
            one["bits"] = float(one["bits"].mean())
        return {"failed": failed, "trained": of, "images": len(x)}

    def trained(self, contender: Contender, train) -> tuple[Any, int]:
        """Parameters, and how many steps they took."""
        rng, clock, steps = np.random.default_rng(0), 0.0, 0
        take, current = contender.start(mixer(self.size), self.size.dim, RATE)
        while clock < self.seconds:
            shape = contender.block, contender.batch, -1
            rows = train[rng.integers(0, len(train), contender.block * contender.batch)]
            batches = np.asarray(in_flow(jax.random.key(steps), rows)[0]).reshape(shape)
            begin = time.perf_counter()
            take(batches, rng.integers(2**31, size=contender.block))
            clock, steps = clock + time.perf_counter() - begin, steps + contender.block
        return current(), steps

    def table(self, results: Results) -> str:
        rows = [
            [name, f"{one['bits']:.3f} +- {one['error']:.3f}", str(one.get("steps", ""))]
            for result in results.values()
            for name, one in result["trained"].items()
        ]
        table = show.markdown(["", "bits per dimension of test images", "steps"], rows)
        return table + "".join(map(show.failures, results.values()))

    def brief(self, results: Results) -> str:
        """A sentence a case."""
        told = [
            f"{case}, bits per dimension of the first {result['images']} test images: " + ", ".join(
                f"{name} {one['bits']:.3f} +- {one['error']:.3f}"
                + (f" ({one['steps']} steps of {one['batch']})" if "steps" in one else "")
                for name, one in result["trained"].items()
            )
            for case, result in results.items()
        ]  # fmt: skip
        return "\n\n".join(f"{text}." for text in told)


def check_bits(problem: FlowProblem, told, bits: np.ndarray, few: int = 100) -> None:
    """Raise unless torchdiffeq finds the same of the first images."""
    p = problem._replace(x=problem.x[:few], probe=problem.probe[:few])
    difference = told(in_torch().torchdiffeq_log_prob(p)(1e-4)[1][0]) - bits[:few]
    mean, most = abs(difference.mean()), abs(difference).max()
    if not (mean < 1e-3 and most < 1e-2):
        raise AssertionError(f"bits differ by {mean} in the mean, by {most} at most")


def gaussian(train, x) -> np.ndarray:
    """Log-densities of the normal distribution with the moments of the training rows."""
    from scipy.stats import multivariate_normal

    rows = np.asarray(train, np.float64)
    covariance: Any = np.cov(rows.T) + 1e-6 * np.eye(rows.shape[1])
    return multivariate_normal(rows.mean(axis=0), covariance).logpdf(np.asarray(x))


class OnImages(Benchmark):
    title = "Flows on images of MNIST's size"
    limit = 3600.0
    cases: Mapping[str, Matching | Likelihood | LogDensities | Training] = {
        "step of matching, 64 images, width 96, 6 blocks": Matching(Images(64, 96, 6)),
        "step of the likelihood, 16 images, width 32, 2 blocks": Likelihood(Images(16, 32, 2)),
        "log-densities of 64 images, width 32, 2 blocks": LogDensities(Images(64, 32, 2)),
        "five minutes of training on MNIST": Training(Images(128, 96, 6), 300.0, 500),
    }

    def run(self, case: str, bench: Bench) -> Result:
        return self.cases[case].run(case, bench)

    def table(self, results: Results) -> str:
        return "\n\n".join(self.cases[case].table({case: of}) for case, of in results.items())

    def brief(self, results: Results) -> str:
        trained = {case: of for case, of in results.items() if "trained" in of}
        told = [self.cases[case].brief({case: of}) for case, of in trained.items()]
        return "\n\n".join(filter(None, [super().brief(results), *told]))

    def draw(self, results: Results) -> Figure | None:
        groups = {
            case: {
                name: 1e3 * at["median"] for name, at in of["at_target"].items() if "median" in at
            }
            for case, of in results.items()
            if "at_target" in of
        }
        return show.bars(groups, "ms") if groups else None


BENCHMARK = OnImages()
