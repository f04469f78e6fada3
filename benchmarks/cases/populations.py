"""Populations of patients, beside published estimates of the same models.

    git clone https://github.com/nlmixr2/nlmixr2data
    pip install rdata
    python -m benchmarks.cases.populations --data nlmixr2data

nlmixr2 maximizes the same approximation of the likelihood (FOCE with interaction). Published are
its pages "Running nlmixr2" (theophylline) and "Working with multiple endpoints" (warfarin: its own
message says that the search did not converge). Of warfarin, the second row has one rate of both
absorptions and an inhibition that is complete, four parameters less. Seconds are of one core,
with compilation.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.nn import sigmoid

import jaxode
from benchmarks.harness import show
from benchmarks.harness.fairness import double_precision

Array = Any
Params = dict[str, Any]


class Case(NamedTuple):
    file: str
    channels: tuple[str, ...]
    f: Callable[..., Array]
    y0: Callable[..., Array]
    observe: Callable[..., Array]
    noise: Callable[..., Array] | None
    start: Params
    vary: Params
    published: str


def absorbed(t, y, given):
    params, _ = given
    taken, out = jnp.exp(params["ka"]) * y[0], jnp.exp(params["cl"] - params["v"]) * y[1]
    return jnp.stack([-taken, taken - out])


def inhibited(t, y, given):
    """A drug through two compartments, and a turnover that it inhibits."""
    params, _ = given
    depot, gut, center, effect = y
    first = jnp.exp(params.get("ktr", params["ka"])) * depot
    second = jnp.exp(params["ka"]) * gut
    concentration = center * jnp.exp(-params["v"])
    most = sigmoid(params["emax"]) if "emax" in params else 1.0
    left = 1 - most * concentration / (jnp.exp(params["ec50"]) + concentration)
    turnover = jnp.exp(params["kout"]) * (jnp.exp(params["e0"]) * left - effect)
    out = jnp.exp(params["cl"]) * concentration
    return jnp.stack([-first, first - second, second - out, turnover])


def both_noises(predicted, params):
    part, rest = jnp.exp(params["part"]) * predicted[..., 0], jnp.exp(params["add"])
    of_effect = jnp.exp(params["of effect"])
    return jnp.stack([jnp.sqrt(part**2 + rest**2), jnp.full_like(part, of_effect)], axis=-1)


def dosed(states: int):
    return lambda params, dose: jnp.zeros(states).at[0].set(dose)


def with_effect(params, dose):
    return dosed(4)(params, dose).at[3].set(jnp.exp(params["e0"]))


def concentration(t, y, given):
    return (y[1] * jnp.exp(-given[0]["v"]))[None]


def concentration_and_effect(t, y, given):
    return jnp.stack([y[2] * jnp.exp(-given[0]["v"]), y[3]])


ONE_RATE = {
    "ka": 0.0, "cl": np.log(0.1), "v": np.log(10.0), "part": np.log(0.1), "add": np.log(0.1),
    "ec50": np.log(0.5), "kout": np.log(0.05), "e0": np.log(100.0), "of effect": np.log(10.0),
}  # fmt: skip
ONE_RATE_VARIES = {"ka": 1.0, "cl": 2**0.5, "v": 1.0} | dict.fromkeys(("ec50", "kout", "e0"), 0.7)
WARFARIN = Case(
    "warfarin", ("cp", "pca"), inhibited, with_effect, concentration_and_effect, both_noises,
    ONE_RATE, ONE_RATE_VARIES, "none",
)  # fmt: skip
CASES = {
    "theophylline": Case(
        "theo_sd", ("2",), absorbed, dosed(2), concentration, None,
        {"ka": 0.45, "cl": 1.0, "v": 3.45}, {"ka": 0.6, "cl": 0.3, "v": 0.1}, "-179.70",
    ),
    "warfarin": WARFARIN._replace(
        start=ONE_RATE | {"ktr": 0.0, "emax": np.log(4.0)},
        vary=ONE_RATE_VARIES | {"ktr": 1.0, "emax": 0.7},
        published="-1131.24",
    ),
    "warfarin, one rate, complete": WARFARIN,
}  # fmt: skip


def read(folder: Path, case: Case) -> tuple[Array, Array, Array]:
    """Times, observations and doses. Values of one time and channel are rows of their own."""
    import rdata

    table = rdata.read_rda(folder / "data" / f"{case.file}.rda")[case.file]
    table.columns = table.columns.str.lower()
    channel = table["dvid" if "dvid" in table else "cmt"].astype(str)
    rows, doses = [], []
    for _, own in table.assign(channel=channel).groupby("id"):
        doses.append(own.amt.max())
        lines = []
        for time_, there in own[own.evid == 0].groupby("time"):
            values = [there.dv[there.channel == name].tolist() for name in case.channels]
            for i in range(max(map(len, values))):
                lines.append([time_, *(each[i] if i < len(each) else np.nan for each in values)])
        rows.append(np.array(lines, float))
    most = max(map(len, rows))
    ts = np.stack([np.append(own[:, 0], np.full(most - len(own), own[-1, 0])) for own in rows])
    ys = np.full((len(rows), most, len(case.channels)), np.nan)
    for i, own in enumerate(rows):
        ys[i, : len(own)] = own[:, 1:]
    return ts, ys, np.array(doses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a clone of nlmixr2data")
    parser.add_argument("--match", default="", help="a part of the names of cases")
    given = parser.parse_args()
    rows = []
    with double_precision():
        for name, case in CASES.items():
            if given.match not in name:
                continue
            ts, ys, doses = read(given.data, case)
            begin = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # shown as "converged"
                found = jaxode.estimate_population(
                    case.f, case.y0, ts, ys, case.start, case.vary, observe=case.observe,
                    noise=case.noise, row_args=doses,
                )  # fmt: skip
            seconds = time.process_time() - begin
            print(found, flush=True)
            row = [name, f"{-found.nll:.2f}", case.published, str(bool(found.converged))]
            rows.append([*row, f"{seconds:.0f}"])
    header = ["", "log-likelihood", "nlmixr2", "converged", "CPU s"]
    print(show.markdown(header, rows))


if __name__ == "__main__":
    main()
