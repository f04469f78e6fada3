"""The Python blocks of the README run, in order, as one program."""

import pathlib
import re

import jax
import jax.numpy as jnp

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_code_blocks_run(default_settings):
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    scope = {}
    exec("\n".join(blocks), scope)
    arrays = [x for x in jax.tree.leaves(scope) if isinstance(x, jax.Array)]
    numbers = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert numbers
    # The four Gaussians have 8.38 nats in the units of the data, and a Gaussian 9.71.
    assert 8.3 < -scope["log_density"].mean() < 9.0
    scale = scope["data"].std(0)
    assert jnp.allclose(scope["samples"].std(0), scale, rtol=0.15)
    assert all(jnp.isfinite(x).all() for x in numbers)
