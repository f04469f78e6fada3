"""Flows on images of MNIST's size: training steps, and log-densities with one probe.

All contenders get a network of `jaxode.nn.Mixer`, ported to PyTorch, with the same weights. A step
of matching is one of Adam with a moving average, and draws its noise and times; the network is that
of `examples/mnist.py`. The others are compared at equal error, with a small network that was
trained, so that a case takes minutes. Pixels are random: no time of matching depends on them.
"""

from collections.abc import Mapping
from functools import partial

import jax
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
from benchmarks.harness.problems import Images, images, untrained_images
from benchmarks.peers import flows, trainers

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


class OnImages(Benchmark):
    title = "Flows on images of MNIST's size"
    limit = 3600.0
    cases: Mapping[str, Matching | Likelihood | LogDensities] = {
        "step of matching, 64 images, width 96, 6 blocks": Matching(Images(64, 96, 6)),
        "step of the likelihood, 16 images, width 32, 2 blocks": Likelihood(Images(16, 32, 2)),
        "log-densities of 64 images, width 32, 2 blocks": LogDensities(Images(64, 32, 2)),
    }

    def run(self, case: str, bench: Bench) -> Result:
        return self.cases[case].run(case, bench)

    def table(self, results: Results) -> str:
        return "\n\n".join(self.cases[case].table({case: of}) for case, of in results.items())

    def draw(self, results: Results) -> Figure:
        groups = {
            case: {
                name: 1e3 * at["median"] for name, at in of["at_target"].items() if "median" in at
            }
            for case, of in results.items()
        }
        return show.bars(groups, "ms")


BENCHMARK = OnImages()
