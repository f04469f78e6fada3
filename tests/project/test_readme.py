"""The Python blocks of the README run, in order, as one program."""

import contextlib
import io
import pathlib
import re

import jax
import jax.numpy as jnp

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_code_blocks_run(default_settings):
    text = README.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    scope, shown = {}, io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        exec("\n".join(blocks), scope)
    arrays = [x for x in jax.tree.leaves(scope) if isinstance(x, jax.Array)]
    numbers = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert numbers
    # The four Gaussians have 8.38 nats in the units of the data, and a Gaussian 9.71.
    (output,) = re.findall(r"^```output\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert shown.getvalue() == output
    x, density = scope["data"][:1000], scope["density"]
    assert 8.3 < -density.log_prob(x).mean() < 9.0
    samples = density.sample(jax.random.key(0), (1000,))
    assert jnp.allclose(samples.std(0), x.std(0), rtol=0.15)
    assert all(jnp.isfinite(x).all() for x in numbers)
