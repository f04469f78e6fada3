"""Writes the files that `test_models.py` reads: `PYTHONPATH=tests python tests/saving/keep.py`.

Run it when a model gets another description, with a new version. A file stays as it was written.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas
from untrained import untrained

import jaxode
from jaxode.nn import Ensemble, Residual

FILES = Path(__file__).parent / "files"
VERSION = "0.6"
KEY = jax.random.key(0)


def decay(t, y, params):
    return -params["k"] * y


def small(key, **options):
    return Residual(2, 4, 1, key=key, **options)


def density():
    data = np.random.default_rng(0).gamma(4.0, 250.0, (60, 2))
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2))
    network = Ensemble(small, 2, key=KEY)
    bound = jaxode.bind(flow, network, standardize=data, support=(0.0, jnp.inf))
    return bound, "log_prob", (jnp.asarray(data[:5], jnp.float32),)


def series():
    rng = np.random.default_rng(0)
    ts, ys = np.sort(rng.uniform(0, 5, (8, 6)), axis=1), rng.normal(size=(8, 6, 2))
    model, _ = jaxode.series.fit(ts, ys, key=KEY, steps=1, progress=False)
    return model, "mean", (ts, ys, np.full((8, 1), 6.0))


def table():
    rng = np.random.default_rng(0)
    columns = {
        "size": rng.normal(size=40), "count": rng.integers(0, 50, 40),
        "price": np.round(rng.gamma(2.0, size=40), 1),
    }  # fmt: skip
    frame = pandas.DataFrame(columns)
    inputs = ({name: values[:5] for name, values in columns.items()},)
    return untrained(frame, flow=True), "log_prob", inputs


def estimate():
    ts = jnp.linspace(0.1, 2.0, 5)
    start = {"k": jnp.array([0.9])}
    model = jaxode.estimate(decay, jnp.ones(1), ts, jnp.exp(-0.7 * ts)[:, None], start, noise=0.1)
    return model, "predict", (jnp.array([0.3]),)


MODELS = {"density": density, "series": series, "table": table, "estimate": estimate}


def main() -> None:
    FILES.mkdir(exist_ok=True)
    for name, make in MODELS.items():
        model, method, inputs = make()
        arguments = (pandas.DataFrame(inputs[0]),) if name == "table" else inputs
        returned = jax.tree.leaves(getattr(model, method)(*arguments))
        path = FILES / f"{name}-{VERSION}"
        jaxode.save(path, (model, method, inputs, returned))
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
