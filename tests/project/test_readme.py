"""Each Python block of the README runs, as a program of its own."""

import contextlib
import io
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def run(code):
    """What a block defines and prints, alone."""
    scope, shown = {}, io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        exec(code, scope)
    del scope["__builtins__"]  # what a block defines is searched for arrays
    arrays = [x for x in jax.tree.leaves(scope) if isinstance(x, jax.Array | np.ndarray)]
    numbers = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert numbers
    assert all(jnp.isfinite(x).all() for x in numbers)
    return scope, shown.getvalue()


@pytest.mark.slow  # each block compiles what it trains
@pytest.mark.smoke
@pytest.mark.parametrize("code", BLOCKS, ids=["fit", "table", "series", "own loop"])
def test_a_code_block_runs_alone(code, default_settings):
    """After three steps of training."""
    _, shown = run(re.sub(r"(steps=|in range\()\d+(?=\))", r"\g<1>3", code))
    assert re.fullmatch(r"(-\d+ nats|0\.\d+|1\.0)\n" if "print" in code else "", shown)


@pytest.mark.slow  # whole trainings, whose results the README promises
def test_code_blocks_learn_what_they_say(default_settings):
    fitted, _, series, own = BLOCKS
    # The four Gaussians have 8.38 nats in the units of the data, and a Gaussian 9.71.
    (output,) = re.findall(r"print\(.*# (.*)\n", fitted)
    assert run(fitted)[1] == f"{output}\n"
    # Intervals cover as much of new readings as they say, and follow their mean.
    scope, shown = run(series)
    assert re.search(r"print\(.*# (0\.\d) of", series)[1] == shown.strip()
    truth = 70 + 8 * np.sin(scope["at"][:, 0] + np.arange(400, 600))
    middle = (scope["low"] + scope["high"])[:, 0, 0] / 2
    assert np.sqrt(np.mean((middle - truth) ** 2)) < 1.0
    # The circle has a mean square of one half.
    assert run(own)[0]["loss"] < 0.01
