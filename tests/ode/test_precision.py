"""Products run at full precision, which accelerators would round to 10 or 7 bits, if not asked."""

import jax
import jax.numpy as jnp
import pytest
from helpers import with_slow

import jaxode


@jax.custom_jvp
def product_with_jvp(A, y):
    return A @ y


@product_with_jvp.defjvp
def _product_jvp(primals, tangents):
    (A, y), (dA, dy) = primals, tangents
    # By the function itself, whose rule then also gives the second derivatives.
    return product_with_jvp(A, y), product_with_jvp(A, dy) + dA @ y


product_with_vjp = jax.custom_vjp(lambda A, y: A @ y)
product_with_vjp.defvjp(
    lambda A, y: (A @ y, (A, y)),
    lambda inputs, bar: (bar[:, None] @ inputs[1][None], inputs[0].T @ bar),
)


def either(A, y):
    return product_with_vjp(A, y) + product_with_jvp(A, y)


def in_branch(A, y):
    """In inner programs: those of `jit` and `cond`."""
    return jax.jit(lambda A, y: jax.lax.cond(y[0] > 0, product_with_vjp, lambda A, y: y, A, y))(
        A, y
    )


def end(product, **options):
    """By the matrix, the state, and the times of the outputs."""

    def of(A, y0, ts):
        f = lambda t, y, A: product(A, y)
        return jaxode.solve(f, y0, 0.0, 1.0, A, ts=ts, throw=False, **options).ys.sum()

    return of


def of_nll(A, y, ts):
    flow = jaxode.cnf(
        lambda t, z, A: product_with_jvp(A, z), jaxode.standard_normal(2),
        divergence=jaxode.divergence.exact(),
    )  # fmt: skip
    return flow.nll(A, y[None])


def of_event(A, y0, ts, **options):
    event = jaxode.Event(lambda t, y, A: product_with_jvp(A, y)[0] - 1.5)
    options = options or {"event": event}
    solution = jaxode.solve(lambda t, y, A: y, y0, 0.0, 1.0, A, throw=False, **options)
    return solution.t1 + solution.y1.sum()


def of_jump(A, y0, ts):
    change = lambda t, y, A, i: product_with_vjp(A, y)
    return of_event(A, y0, ts, jumps=jaxode.Jumps(ts[:1], change))


BACK, FORWARD = {"adjoint": jaxode.BacksolveAdjoint()}, {"adjoint": jaxode.ForwardMode()}
by_all = lambda f, derive=jax.grad: derive(f, (0, 1, 2))
PROGRAMS = {
    "discrete": by_all(end(either)),
    "backsolve": by_all(end(either, **BACK)),
    "forward": by_all(end(product_with_jvp, **FORWARD), jax.jacfwd),
    "in a branch": by_all(end(in_branch)),
    "forward over reverse": by_all(by_all(end(product_with_jvp)), jax.jacfwd),
    "nll": jax.grad(of_nll, (0, 1)),
    "the change at a jump": by_all(of_jump),
    "the condition for an event": by_all(of_event),
}
INPUTS = (jnp.eye(2), jnp.ones(2), jnp.array([0.5, 1.0]))


@pytest.mark.parametrize("case", with_slow(PROGRAMS, ["in a branch", "nll"]))  # as the others
def test_products_in_rules_of_differentiation_run_at_full_precision(case):
    program = jax.jit(PROGRAMS[case]).lower(*INPUTS).as_text()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 3
    assert [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line] == []


def precisions(**options):
    """How many products of the gradient run at each."""
    run = end(lambda A, y: A @ y, **options)
    program = str(jax.make_jaxpr(jax.grad(run, (0, 1)))(*INPUTS))
    return {name: program.count(f"precision=(Precision.{name}") for name in ("HIGHEST", "DEFAULT")}


def test_products_of_the_field_run_at_the_precision_that_is_asked_for():
    full, low = precisions(), precisions(precision="default")
    assert full["DEFAULT"] == 0 < low["DEFAULT"]
    assert sum(full.values()) == sum(low.values())
    # What is set for JAX counts as well, but less than what is asked for.
    with jax.default_matmul_precision("default"):
        assert precisions() == low
        assert precisions(precision="highest") == full
    with pytest.raises(ValueError, match=r"solve\(precision=...\): must be None, 'highest'"):
        precisions(precision="low")
