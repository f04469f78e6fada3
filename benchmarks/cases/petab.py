"""Likelihoods of published estimation problems at their nominal parameters, beside published ones.

    git clone https://github.com/Benchmarking-Initiative/Benchmark-Models-PEtab
    python -m benchmarks.cases.petab --data Benchmark-Models-PEtab
    python -m benchmarks.cases.petab --data Benchmark-Models-PEtab --match Boehm
    python -m benchmarks.cases.petab --data Benchmark-Models-PEtab --match Boehm --starts 20
    python -m benchmarks.cases.petab --data Benchmark-Models-PEtab --match Boehm --starts 20 --scipy

Published are those of AMICI's tests of the collection (`tests/benchmark_models` in
AMICI-dev/AMICI); the best known of Bertozzi, Crauste and Rahman. Seconds are those of one core's
work, by the clock of the process: to load a problem, to compile and compute its likelihood, and to
compute it again. With `--starts`, a row says from how many starts, uniform within the bounds, the
search ends within two units of the published likelihood, which nearly all problems have at the best
known parameters; the seconds of a start share those of compilation. With `--scipy`, SciPy searches
from the same starts, a CPU minute at most from each (`peers/petab_fits.py`).
"""

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

import jaxode
from benchmarks.harness import show
from benchmarks.harness.fairness import double_precision
from benchmarks.peers.petab_fits import by_scipy

PUBLISHED = {
    "Bachmann_MSB2011": -418.4057,
    "Beer_MolBioSystems2014": -58622.9146,
    "Bertozzi_PNAS2020": 158.8643,
    "Boehm_JProteomeRes2014": 138.2220,
    "Borghans_BiophysChem1997": -83.3237,
    "Brannmark_JBC2010": 141.8891,
    "Bruno_JExpBot2016": -46.6882,
    "Crauste_CellSystems2017": 190.9640,
    "Elowitz_Nature2000": -63.2028,
    "Fiedler_BMCSystBiol2016": -58.5839,
    "Fujita_SciSignal2010": -53.0838,
    "Isensee_JCB2018": 3949.3760,
    "Lucarelli_CellSystems2018": 1681.6060,
    "Rahman_MBS2016": 21.1535,
    "Schwen_PONE2014": 943.9993,
    "Smith_BMCSystBiol2013": 888198.4365,
    "Sneyd_PNAS2002": -319.7918,
    "Weber_BMC2015": 296.2018,
    "Zheng_PNAS2012": -278.3335,
}
HEADER = [
    "problem",
    "parameters",
    "-log-likelihood",
    "published",
    "load, s",
    "first, s",
    "again, s",
]

OF_STARTS = ["problem", "starts", "within 2", "best -log-likelihood", "published", "s a start"]


def row_of_starts(path: Path, count: int, seconds: float, scipy: bool) -> list[str]:
    """How a search from some starts ended on a problem."""
    name, begun = path.parent.name, time.process_time()
    problem = jaxode.petab.load(path)
    starts = problem.starts(jax.random.key(0), count)
    if scipy:
        nlls = by_scipy(problem, starts)
    else:
        found = problem.estimate(starts, seconds=seconds)
        nlls = np.asarray(found.costs - found.cost + found.nll)
    took = (time.process_time() - begun) / count
    near = np.count_nonzero(nlls < PUBLISHED[name] + 2)
    return [
        name, f"{count}", f"{near}", f"{nlls.min():.4f}", f"{PUBLISHED[name]:.4f}", f"{took:.1f}",
    ]  # fmt: skip


def row_of(path: Path) -> list[str]:
    """A problem's row of the table."""
    name, clock = path.parent.name, [time.process_time()]
    published = f"{PUBLISHED[name]:.4f}" if name in PUBLISHED else ""
    try:
        problem = jaxode.petab.load(path)
    except ValueError as error:
        return [name, "", str(error).partition(": ")[2], published, "", "", ""]
    for _ in range(2):
        clock.append(time.process_time())
        found = float(problem.nll(problem.nominal))
    clock.append(time.process_time())
    times = [f"{b - a:.2f}" for a, b in itertools.pairwise(clock)]
    jax.clear_caches()
    return [name, f"{len(problem.names)}", f"{found:.4f}", published, *times]


def problems(data: Path, match: str) -> Iterator[Path]:
    """The first problem of each folder of the collection."""
    for folder in sorted((data / "Benchmark-Models").iterdir()):
        if match in folder.name and (files := sorted(folder.glob("*.yaml"))):
            own = [file for file in files if file.stem == folder.name]
            yield (own or files)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a clone of the collection")
    parser.add_argument("--match", default="", help="a part of the names of problems")
    parser.add_argument("--starts", type=int, default=0, help="estimate from so many starts")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of the search on a problem")
    parser.add_argument("--scipy", action="store_true", help="search by SciPy, with --starts")
    given = parser.parse_args(arguments)
    with double_precision():
        print(show.markdown(OF_STARTS if given.starts else HEADER, []), flush=True)
        for path in problems(given.data, given.match):
            if given.starts and path.parent.name not in PUBLISHED:
                continue
            search = given.starts, given.seconds, given.scipy
            row = row_of_starts(path, *search) if given.starts else row_of(path)
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
