"""The table of rules, and the names that messages start with."""

import jax
import jax.numpy as jnp
import pytest
from helpers import AT_RUN_TIME

import jaxode
from jaxode._checks import rules

A_TENTH = rules.Rule(
    "{name}=...", lambda rtol: rtol <= 0.1, "must be at most a tenth", "Tighten it."
)
TOLD = r"solve\(rtol=...\): must be at most a tenth"


def test_a_new_rule_is_one_row(monkeypatch):
    """Checked at once where the value is known, by the program where it is traced."""
    monkeypatch.setattr(rules, "SOLVE", (*rules.SOLVE, (A_TENTH, ("rtol",))))

    def solve(rtol):
        return jaxode.solve(lambda t, y, _: -y, jnp.ones(2), 0.0, 1.0, rtol=rtol).y1

    with pytest.raises(ValueError, match=TOLD + "; got 0.5. Tighten it."):
        solve(0.5)
    assert jnp.isfinite(jax.jit(solve)(0.01)).all()
    with pytest.raises(AT_RUN_TIME, match=TOLD + ". Tighten it."):
        jax.block_until_ready(jax.jit(solve)(0.5))


def test_the_innermost_function_is_named():
    """Also after a failure inside of it."""
    density = jaxode.bind(jaxode.cnf(lambda t, z, _: -z, jaxode.standard_normal(2)), None)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^log_prob\(x=...\): must have shape"):
            density.log_prob(jnp.ones(3))
        with pytest.raises(ValueError, match=r"^cnf\(rtol=...\): must be a finite tolerance"):
            jaxode.cnf(lambda t, z, _: -z, jaxode.standard_normal(2), rtol=-1.0)
