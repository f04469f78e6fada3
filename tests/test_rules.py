"""Every wrong call gets one clear sentence: one row for each rule."""

from functools import partial
from types import SimpleNamespace

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import RK4

import jaxode
from jaxode import divergence

ONE = jnp.ones(2)


def decay(t, y, args):
    return -y


def solve(f=decay, y0=ONE, t0=0.0, t1=1.0, **options):
    return jaxode.solve(f, y0, t0, t1, **options)


def flow(z=None, f=decay, **options):
    return jaxode.flow(f, jnp.ones((3, 2)) if z is None else z, 0.0, 1.0, **options)


def cnf(event=2, **options):
    return jaxode.cnf(lambda t, z, p: -z, jaxode.standard_normal(event), **options)


def odeint(func=lambda y, t: -y, **options):
    return jaxode.odeint(func, ONE, jnp.array([0.0, 1.0]), **options)


X = jnp.ones((4, 2))
KEY = jax.random.key(0)

NETWORK = jaxode.nn.MLP(2, (4,), key=KEY)
OWN_DIVERGENCE = divergence.Divergence(lambda key, z: None, divergence.exact().apply)
OF_EACH_PROBE = divergence.Divergence(lambda key, z: None, lambda g, z, probe: (g(z), z))
OF_EACH_NUMBER = jaxode.regularizers.Regularizer("kinetic", 0.1, lambda dz, norm: dz**2)
# Other methods than nll look at more than these two.
INIT_AND_APPLY = SimpleNamespace(init=OWN_DIVERGENCE.init, apply=OWN_DIVERGENCE.apply)


class WrongShape:
    """A field whose divergence is not a scalar."""

    def __call__(self, t, z, args):
        return -z

    def value_and_divergence(self, t, z, args):
        return -z, -jnp.ones(2)


class OnCircle(diffrax.Tsit5):
    """A solver with a step of its own."""

    def step(self, *args, **options):
        y1, *rest = super().step(*args, **options)
        return y1 / jnp.linalg.norm(y1), *rest


# (call, exception, message). A new rule is one row.
BAD_INPUT = [
    (
        lambda: jax.vmap(
            lambda y0: solve(y0=y0, axis_name="i", event=jaxode.Event(lambda t, y, args: y[0])),
            axis_name="i",
        )(jnp.ones((2, 2))), ValueError,
        "solve(event=...): needs the whole state; got axis_name='i', along which it is split. "
        "Leave axis_name out: rows with steps of their own need none.",
    ),
    (
        lambda: jaxode.bind(cnf(), None).log_prob(X, batch_size=0), ValueError,
        "log_prob(batch_size=...): must be a positive integer; got 0.",
    ),
    (
        lambda: jaxode.bind(cnf(), None).sample(KEY, 3, progress="bar"), TypeError,
        "sample(progress=...): must be True or False; got 'bar'.",
    ),
    (
        lambda: cnf(throw="no"), TypeError,
        "cnf(throw=...): must be True or False; got 'no'.",
    ),
    (
        lambda: jaxode.plot.density(lambda x: x[:, 0], (0, 1, 0, 1), colorbar="no"), TypeError,
        "plot.density(colorbar=...): must be True or False; got 'no'.",
    ),
    (
        lambda: solve(y0=jnp.array([1, 2])), TypeError,
        "solve(y0=...): leaves must have a floating dtype; got int64. "
        "Write 1.0 for 1, or convert with .astype(jnp.float32).",
    ),
    (
        lambda: solve(y0=jnp.array([1j])), TypeError,
        "solve(y0=...): leaves must have a floating dtype; got complex128. "
        "Pass real and imaginary parts, such as (y.real, y.imag).",
    ),
    (
        lambda: solve(y0={"a": "text"}), TypeError,
        "solve(y0=...): leaves must be floating arrays; got str. "
        "Pass things that are not part of the state in args.",
    ),
    (
        lambda: solve(y0=()), ValueError,
        "solve(y0=...): must hold at least one array; got ().",
    ),
    (
        lambda: solve(f=lambda t, y, args: y[0]), ValueError,
        "solve(f=...): f(t, y, args) must return the shapes of y; got () where y has (2,). "
        "f sees one sample of a batch.",
    ),
    (
        lambda: solve(f=lambda t, y, args: (y, y)), ValueError,
        "solve(f=...): f(t, y, args) must return the structure of y, PyTreeDef(*); "
        "got PyTreeDef((*, *)).",
    ),
    (
        lambda: solve(f=lambda t, y, args: jnp.array([1, 2])), TypeError,
        "solve(f=...): f(t, y, args) must return floating arrays; got int64.",
    ),
    (
        lambda: solve(ts=jnp.array([0.5, 0.2])), ValueError,
        "solve(ts=...): times must increase from t0=0.0 to t1=1.0; got 0.5 before 0.2. "
        "Sort them, or extend the solve.",
    ),
    (
        lambda: solve(t0=1.0, t1=0.0, ts=jnp.array([0.2, 0.5])), ValueError,
        "solve(ts=...): times must decrease from t0=1.0 to t1=0.0; got 0.2 before 0.5. "
        "Sort them, or extend the solve.",
    ),
    (
        lambda: solve(ts=jnp.array([0.5, 1.5])), ValueError,
        "solve(ts=...): times must increase from t0=0.0 to t1=1.0; got 1.5 before t1=1.0. "
        "Sort them, or extend the solve.",
    ),
    (
        lambda: solve(ts=jnp.ones((2, 2))), ValueError,
        "solve(ts=...): must be a vector of at least one time; got shape (2, 2).",
    ),
    (
        lambda: solve(t0=jnp.ones(2)), ValueError,
        "solve(t0=...): must be a scalar time; got shape (2,). Rows have their own times with "
        "per-sample steps only.",
    ),
    (
        lambda: solve(t1=float("inf")), ValueError,
        "solve(t1=...): must be a finite time; got inf.",
    ),
    (
        lambda: solve(t1=1j), TypeError,
        "solve(t1=...): must be a real time; got a complex number.",
    ),
    (
        lambda: solve(t1="1"), TypeError, "solve(t1=...): must be a real time; got '1'.",
    ),
    (
        lambda: solve(ts="ab"), TypeError,
        "solve(ts=...): must be a vector of real times; got 'ab'.",
    ),
    (
        lambda: solve(y0=jnp.ones(1, jnp.float32), t0=1e8, t1=1e8 + 1), ValueError,
        "solve(t0=..., t1=...): the span from 100000000.0 to 100000001.0 is lost in the precision "
        "of float32, in which the state is solved. Shift the time, or use float64 for the state.",
    ),
    (
        lambda: solve(f=None), TypeError,
        "solve(f=...): must be a function f(t, y, args); got None.",
    ),
    (
        lambda: solve(f=lambda t, y, args: "text"), TypeError,
        "solve(f=...): f(t, y, args) must return arrays; got str.",
    ),
    (
        lambda: jaxode.cnf(decay, 2), TypeError,
        "cnf(base=...): must have event_shape, log_prob and sample; got 2. "
        "Use jaxode.standard_normal(event_shape).",
    ),
    (
        lambda: cnf(divergence="exact"), TypeError,
        "cnf(divergence=...): must be a Divergence; got 'exact'. "
        "Use a function of jaxode.divergence, called: jaxode.divergence.exact(); or, for your own, "
        "jaxode.divergence.Divergence(init, apply).",
    ),
    (
        lambda: cnf(divergence=INIT_AND_APPLY), TypeError,
        f"cnf(divergence=...): must be a Divergence; got {INIT_AND_APPLY!r}. "
        "Use a function of jaxode.divergence, called: jaxode.divergence.exact(); or, for your own, "
        "jaxode.divergence.Divergence(init, apply).",
    ),
    (
        lambda: cnf().log_prob(None, [[0.0, 1.0]]), TypeError,
        "log_prob(x=...): must be an array of numbers; got list. Convert it with np.asarray(..., "
        "np.float32), and fill what is masked.",
    ),
    (
        lambda: solve(solver="dopri5"), TypeError,
        "solve(solver=...): must be an ODE solver, such as diffrax.Tsit5() or jaxode.Rodas5P(); "
        "got 'dopri5'.",
    ),
    *(
        (
            lambda call=call, solver=solver: call(solver=solver), ValueError,
            f"{call.__name__}(solver=...): must be an explicit Runge-Kutta solver of diffrax, "
            "without a step of its own, or a stiff solver of jaxode; got "
            f"{type(solver).__name__}. Use solver=jaxode.Rodas5P() for a stiff problem, or call "
            "diffrax.diffeqsolve.",
        )
        for call in (solve, flow, cnf)
        for solver in (diffrax.Kvaerno5(), diffrax.SemiImplicitEuler(), OnCircle())
    ),
    (
        lambda: cnf(solver=jaxode.Rodas5P(), adjoint=jaxode.BacksolveAdjoint()), ValueError,
        "cnf(adjoint=...): BacksolveAdjoint needs an explicit Runge-Kutta solver; got Rodas5P. Use "
        "jaxode.DiscreteAdjoint().",
    ),
    (
        lambda: solve(solver=jaxode.Rodas5P(), axis_name="batch"), ValueError,
        "solve(axis_name=...): Rodas5P needs the Jacobian of the whole state; got batch=None. Do "
        "not split the state. If a batch is split, pass batch='joint', or 'per_sample' without "
        "axis_name.",
    ),
    (
        lambda: solve(solver=jaxode.Rodas5P(), axis_name="batch", batch="per_sample"), ValueError,
        "solve(axis_name=...): Rodas5P needs the Jacobian of the whole state; got "
        "batch='per_sample'. Do not split the state. If a batch is split, pass batch='joint', or "
        "'per_sample' without axis_name.",
    ),
    (
        lambda: jaxode.BacksolveAdjoint(rtol=-1), ValueError,
        "BacksolveAdjoint(rtol=...): must be None or a finite tolerance of at least 0; got -1.",
    ),
    (
        lambda: jaxode.odeint(lambda y, t: -y, ONE, jnp.array([0, 1])), TypeError,
        "odeint(t=...): must be an array of floats; got int64.",
    ),
    (
        lambda: jaxode.odeint(lambda y, t: -y, ONE, jnp.array([0.0, 1.0]), hmax=0), ValueError,
        "odeint(hmax=...): must be a positive number; got 0.",
    ),
    (
        lambda: solve(solver=diffrax.Euler()), ValueError,
        "solve(solver=...): Euler has no error estimate; got steps=None. "
        "Pass steps=N for N equal steps, or an adaptive solver such as diffrax.Tsit5().",
    ),
    (
        lambda: solve(solver=RK4()), ValueError,
        "solve(solver=...): RK4 has no error estimate; got steps=None. "
        "Pass steps=N for N equal steps, or an adaptive solver such as diffrax.Tsit5().",
    ),
    (
        lambda: solve(steps=0), ValueError,
        "solve(steps=...): must be a positive integer; got 0.",
    ),
    (
        lambda: solve(max_steps=2.5), ValueError,
        "solve(max_steps=...): must be a positive integer; got 2.5.",
    ),
    (
        lambda: solve(rtol=-1.0), ValueError,
        "solve(rtol=...): must be a finite tolerance of at least 0; got -1.0.",
    ),
    (
        lambda: jaxode.solve(decay, jnp.ones(1, "f4"), 0.0, 1.0, rtol=0.0, atol=1e-40), ValueError,
        "solve(rtol=0, atol=1e-40): at least one tolerance must be positive in float32, in which "
        "the state is solved.",
    ),
    (
        lambda: solve(rtol=0.0, atol=0.0), ValueError,
        "solve(rtol=0, atol=0): at least one tolerance must be positive.",
    ),
    (
        lambda: solve(first_step=0.0), ValueError,
        "solve(first_step=...): must be positive and finite; got 0.0.",
    ),
    (
        lambda: jaxode.DiscreteAdjoint(1), ValueError,
        "DiscreteAdjoint(checkpoints=...): must be an integer of at least 2; got 1. "
        "The default is 64.",
    ),
    (
        lambda: solve(adjoint="backsolve"), TypeError,
        "solve(adjoint=...): must be a gradient method such as jaxode.DiscreteAdjoint(); "
        "got 'backsolve'.",
    ),
    (
        lambda: flow(z=jnp.ones(())), ValueError,
        "flow(z=...): leaves must share a leading batch axis; got shapes [()]. "
        "Use solve without batch for a single system.",
    ),
    (
        lambda: flow(z=(jnp.ones((2, 1)), jnp.ones((3, 1)))), ValueError,
        "flow(z=...): leaves must share a leading batch axis; got shapes [(2, 1), (3, 1)]. "
        "Use solve without batch for a single system.",
    ),
    (
        lambda: flow(batch="each"), ValueError,
        "flow(batch=...): must be 'joint' or 'per_sample'; got 'each'.",
    ),
    (
        lambda: flow(f=lambda t, y, args: jnp.ones((3, 2))), ValueError,
        "flow(f=...): f(t, y, args) must return the shapes of y; got (3, 2) where y has (2,). "
        "f sees one sample of a batch. All samples share args: pass what each has for itself as "
        "row_args (docs/many.md).",
    ),
    *(
        (
            lambda f=f, run=run: run(jaxode.cnf(f, jaxode.standard_normal(2))), error,
            f"cnf(f=...): f(t, y, args) must return {told}",
        )
        for f, error, told in (
            (lambda t, z, p: jnp.ones(3), ValueError, "the shapes of y; got (3,) where y has (2,). "
             "f sees one sample of a batch."),
            (lambda t, z, p: {"a": z}, ValueError, "the structure of y, PyTreeDef(*); got "
             "PyTreeDef({'a': *})."),
            (lambda t, z, p: jnp.ones(2, int), TypeError, "floating arrays; got int64."),
        )
        for run in (
            lambda flow: flow.log_prob(None, X), lambda flow: flow.sample_and_log_prob(None, KEY, 4)
        )
    ),
    (
        lambda: cnf(divergence=divergence.hutchinson()).nll(None, X), ValueError,
        "hutchinson: a stochastic divergence needs random numbers; got key=None. "
        "Pass key=jax.random.key(...), or use divergence=jaxode.divergence.exact().",
    ),
    (
        lambda: cnf().log_prob(None, jnp.ones((4, 3))), ValueError,
        "log_prob(x=...): must have shape [batch, 2]; got (4, 3).",
    ),
    (
        lambda: cnf().nll(None, jnp.ones(2)), ValueError,
        "nll(x=...): must have shape [batch, 2]; got (2,).",
    ),
    (
        lambda: cnf().nll(None, jnp.ones((4, 2), int)), TypeError,
        "nll(x=...): must have a floating dtype; got int64. Integer-valued data has no density: "
        "dequantize it and convert with .astype(jnp.float32).",
    ),
    (
        lambda: cnf().nll(None, X, weights=jnp.ones(3)), ValueError,
        "nll(weights=...): must have one weight per sample, shape (4,); got (3,).",
    ),
    (
        lambda: cnf().nll(None, X, context=jnp.ones(3)), ValueError,
        "nll(context=...): leaves must have a leading axis of 4, one row per sample; "
        "got shape (3,). To give all samples the same row, pass "
        "jnp.broadcast_to(row, (4, *row.shape)).",
    ),
    (
        lambda: cnf(steer=0.1).nll(None, X), ValueError,
        "nll: steer=0.1 needs random numbers; got key=None. Pass key=jax.random.key(...).",
    ),
    (
        lambda: cnf(steer=-0.1), ValueError,
        "cnf(steer=...): must be a Python number, finite and at least 0; got -0.1.",
    ),
    (
        lambda: cnf(steer="a little"), ValueError,
        "cnf(steer=...): must be a Python number, finite and at least 0; got 'a little'.",
    ),
    (
        lambda: cnf(t0=1.0, t1=-1.0, steer=2), ValueError,
        "cnf(steer=...): must be less than the span |t1 - t0| = 2.0; got 2. "
        "A tenth of the span is a start.",
    ),
    (
        lambda: cnf().sample(None, KEY, -1), ValueError,
        "sample(n=...): must be a number of samples; got -1.",
    ),
    (
        lambda: cnf(tolerance=1e-3), TypeError,
        "cnf: unknown options ['tolerance']. The solve options are ['adjoint', 'atol', "
        "'axis_name', 'breakpoints', 'first_step', 'max_step', 'max_steps', "
        "'precision', 'rtol', 'solver', 'steps'].",
    ),
    (
        lambda: cnf(batch="per-sample"), ValueError,
        "cnf(batch=...): must be 'joint' or 'per_sample'; got 'per-sample'.",
    ),
    (
        lambda: cnf(regularizers=jaxode.regularizers.kinetic_energy(0.1)), TypeError,
        f"cnf(regularizers=...): must be a tuple of jaxode.regularizers; got "
        f"{jaxode.regularizers.kinetic_energy(0.1)!r}.",
    ),
    (
        lambda: cnf(regularizers=2 * (jaxode.regularizers.kinetic_energy(0.1),)), ValueError,
        "cnf(regularizers=...): their names must differ; got ['kinetic_energy', 'kinetic_energy'].",
    ),
    (
        lambda: divergence.hutchinson(True), ValueError,
        "hutchinson(probes=...): must be a positive integer; got True.",
    ),
    (
        lambda: cnf(axis_name="batch", batch="per_sample"), ValueError,
        "cnf(axis_name='batch'): joins the steps of a batch that is split over devices; with "
        "batch='per_sample' each sample has its own. Leave it out.",
    ),
    (
        lambda: flow(tol=1e-3), TypeError,
        "flow: unknown options ['tol']. The solve options are ['adjoint', 'atol', 'axis_name', "
        "'breakpoints', 'first_step', 'max_step', 'max_steps', "
        "'precision', 'rtol', 'solver', 'steps'].",
    ),
    (
        lambda: solve(max_steps=None), ValueError,
        "solve(max_steps=...): must be a positive integer; got None.",
    ),
    (
        lambda: solve(batch="samples"), ValueError,
        "solve(batch=...): must be None, 'joint' or 'per_sample'; got 'samples'.",
    ),
    (
        lambda: solve(y0=jnp.ones(()), batch="joint"), ValueError,
        "solve(y0=...): leaves must share a leading batch axis; got shapes [()]. Use solve without "
        "batch for a single system.",
    ),
    (
        lambda: solve(rtol=jnp.ones(2)), ValueError,
        "solve(rtol=...): must be a scalar; got shape (2,).",
    ),
    (
        lambda: solve(y0=jnp.ones(2, jnp.float32), f=lambda t, y, args: y.astype(jnp.float64)),
        TypeError,
        "solve(f=...): f(t, y, args) must not return more precision than y has; got float64 where "
        "y is float32. Convert args, or y (the parameters of a flow, or its data), to the other "
        "dtype.",
    ),
    (
        lambda: jaxode.standard_normal((2, 0)), ValueError,
        "standard_normal(event_shape=...): must be positive integers; got (2, 0).",
    ),
    (
        lambda: divergence.hutchinson(distribution="uniform"), ValueError,
        "hutchinson(distribution=...): must be 'rademacher', 'gaussian' or 'orthogonal'; "
        "got 'uniform'.",
    ),
    (
        lambda: divergence.hutchinson(0), ValueError,
        "hutchinson(probes=...): must be a positive integer; got 0.",
    ),
    (
        lambda: cnf(divergence=divergence.hutchinson(3, "orthogonal")).nll(None, X, key=KEY),
        ValueError,
        "hutchinson(probes=..., distribution='orthogonal'): at most one probe per dimension; "
        "got 3 for 2 dimensions. Use divergence=jaxode.divergence.exact().",
    ),
    (
        lambda: divergence.exact(chunk=0), ValueError,
        "exact(chunk=...): must be a positive integer; got 0.",
    ),
    (
        lambda: jaxode.odeint(lambda y, t: -y, ONE, jnp.array(1.0)), ValueError,
        "odeint(t=...): must be a vector of times; got shape ().",
    ),
    (
        lambda: jaxode.cnf(None, jaxode.standard_normal(2)), TypeError,
        "cnf(f=...): must be a function f(t, z, params); got None.",
    ),
    (
        lambda: cnf(regularizers=("kinetic",)), TypeError,
        "cnf(regularizers=...): must be a tuple of jaxode.regularizers; got ('kinetic',).",
    ),
    (
        lambda: jaxode.regularizers.kinetic_energy(-1.0), ValueError,
        "kinetic_energy(weight=...): must be a Python number, finite and at least 0; got -1.0.",
    ),
    (
        lambda: cnf(
            divergence=OWN_DIVERGENCE, regularizers=(jaxode.regularizers.jacobian_frobenius(0.1),)
        ).nll(None, X),
        ValueError,
        "nll: a regularizer needs the norm of the Jacobian, which the divergence (a custom "
        "divergence) does not provide. Pass divergence=jaxode.divergence.hutchinson() to cnf.",
    ),
    (
        lambda: cnf(divergence=divergence.closed_form()).nll(None, X), ValueError,
        "closed_form: the vector field offers no value_and_divergence(t, z, args) for these "
        "arguments. Use divergence=jaxode.divergence.exact() or hutchinson().",
    ),
    (
        lambda: jaxode.cnf(WrongShape(), jaxode.standard_normal(2)).nll(None, X), ValueError,
        "value_and_divergence(t, z, args): must return the derivative and a scalar divergence of "
        "one sample; got shapes ((2,), (2,)).",
    ),
    *(
        (
            lambda f=f: f(cnf(divergence=OF_EACH_PROBE)),
            ValueError,
            "cnf(divergence=...): must return one number of a sample; got float64 of shape (2,). "
            "Sum over the event, and average over probes.",
        )
        for f in (lambda flow: flow.nll(None, X), lambda flow: flow.log_prob(None, X))
    ),
    (
        lambda: cnf(regularizers=(OF_EACH_NUMBER,)).nll(None, X), ValueError,
        "cnf(regularizers=...): must return one number of a sample; got float64 of shape (2,). "
        "Sum over the event, and average over probes.",
    ),
    (
        lambda: jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2)).log_prob(
            jaxode.nn.MLP(2, key=KEY, context_size=3), X
        ), ValueError,
        "MLP(context_size=3): the context of a sample must be a vector of this size, and None for "
        "size 0; got shape None. Pass such a context, or leave it out.",
    ),
    (
        lambda: jaxode.nn.MLP(2, key=KEY)(0.0, ONE, ONE), ValueError,
        "MLP(context_size=0): the context of a sample must be a vector of this size, and None for "
        "size 0; got shape (2,). Pass such a context, or leave it out.",
    ),
    (
        lambda: cnf(t0=float("nan")), ValueError, "cnf(t0=...): must be a finite time; got nan.",
    ),
    (
        lambda: cnf(t1=float("inf")), ValueError, "cnf(t1=...): must be a finite time; got inf.",
    ),
    (
        lambda: solve(rtol="a"), TypeError, "solve(rtol=...): must be a real number; got 'a'.",
    ),
    (
        lambda: solve(atol=1j), TypeError,
        "solve(atol=...): must be a real number; got a complex number.",
    ),
    (
        lambda: solve(atol=[1e-5, -1e-5]), ValueError,
        "solve(atol=...): must be a finite tolerance of at least 0; got -1e-05.",
    ),
    (
        lambda: solve(atol=np.ones(3)), ValueError,
        "solve(atol=...): must be a number, or like the state of one row; got shapes (3,) where it "
        "has (2,). All rows share it.",
    ),
    (
        lambda: flow(atol=np.ones((3, 2))), ValueError,
        "flow(atol=...): must be a number, or like the state of one row; got shapes (3, 2) where "
        "it has (2,). All rows share it.",
    ),
    (
        lambda: solve(y0={"a": ONE}, f=lambda t, y, _: y, atol={"b": ONE}), ValueError,
        "solve(atol=...): must be a number, or like the state of one row; got shapes {'b': (2,)} "
        "where it has {'a': (2,)}. All rows share it.",
    ),
    (
        lambda: solve(atol=[1e-5, [1e-5, 1e-5]]), ValueError,
        "solve(atol=...): must be a number, or like the state of one row; got shapes [(), [(), "
        "()]] where it has (2,). All rows share it.",
    ),
    (lambda: solve(atol=[]), TypeError, "solve(atol=...): must be a real number; got []."),
    (
        lambda: solve(rtol=0, atol=[0.0, 1e-5]), ValueError,
        "solve(rtol=0, atol=0): at least one tolerance must be positive.",
    ),
    (
        lambda: cnf(atol=[1e-5, 1e-5]), ValueError,
        "cnf(atol=...): must be a scalar; got shape (2,).",
    ),
    (
        lambda: solve(y0=jnp.ones(2, jnp.float32), rtol=0, atol=1e-300), ValueError,
        "solve(rtol=0, atol=1e-300): at least one tolerance must be positive in float32, in which "
        "the state is solved.",
    ),
    (
        lambda: odeint(mxstep=0.5), ValueError,
        "odeint(mxstep=...): must allow at least one step; got 0.5.",
    ),
    (
        lambda: odeint(rtol=-1), ValueError,
        "odeint(rtol=...): must be a finite tolerance of at least 0; got -1.",
    ),
    (
        lambda: odeint(func=None), TypeError,
        "odeint(func=...): must be a function func(y, t, *args); got None.",
    ),
    (
        lambda: jaxode.nn.MLP(2, 8, key=KEY), TypeError,
        "MLP(widths=...): must be a sequence, one size for each hidden layer; got 8. "
        "Pass widths=(8,).",
    ),
    (
        lambda: jaxode.nn.Concat(2, (4, 0), key=KEY), ValueError,
        "Concat(widths=...): must be a positive integer; got 0.",
    ),
    (
        lambda: jaxode.nn.MLP(0, key=KEY), ValueError,
        "MLP(event_shape=...): must be positive integers; got 0.",
    ),
    (
        lambda: jaxode.nn.MLP(2.7, key=KEY), ValueError,
        "MLP(event_shape=...): must be positive integers; got 2.7.",
    ),
    (
        lambda: jaxode.nn.MLP(2, key=KEY, activation="relu"), TypeError,
        "MLP(activation=...): must be a function; got 'relu'. Pass one such as jax.nn.silu.",
    ),
    *(
        (
            lambda make=make: make(key=0), TypeError,
            f"{name}(key=...): must be a key of jax.random; got int. Pass jax.random.key(0).",
        )
        for name, make in (
            ("MLP", partial(jaxode.nn.MLP, 2)),
            ("Residual", partial(jaxode.nn.Residual, 2)),
            ("Particles", partial(jaxode.nn.Particles, 2, 1)),
            ("Lattice", partial(jaxode.nn.Lattice, 2)),
            ("dequantize", partial(jaxode.images.dequantize, x=jnp.zeros(2), levels=2)),
        )
    ),
    (
        lambda: jax.jit(lambda x: jaxode.fit(jaxode.bind(cnf(), 1.0), x, key=KEY)[1])(X),
        ValueError,
        "fit: looks at data and at the clock, so it runs outside jax.jit, jax.grad and jax.vmap; "
        "got arguments that are traced. Call it between training steps.",
    ),
    (
        lambda: jaxode.bind(cnf(), jaxode.nn.MLP), TypeError,
        "bind(params=...): must be a pytree of parameters; got the class MLP. Call it: "
        "MLP(..., key=key).",
    ),
    (
        lambda: jaxode.nn.MLP(2, key=KEY, context_size=-1), ValueError,
        "MLP(context_size=...): must be an integer of at least 0; got -1.",
    ),
    *(
        (
            lambda given=given: jaxode.nn.Residual(**{"event_shape": 2, "key": KEY, **given}),
            ValueError, "Residual(" + said,
        )
        for given, said in (
            ({"event_shape": 0}, "event_shape=...): must be positive integers; got 0."),
            ({"width": 0}, "width=...): must be a positive integer; got 0."),
            ({"width": (8, 8)}, "width=...): must be a positive integer; got (8, 8)."),
            ({"blocks": 0}, "blocks=...): must be a positive integer; got 0."),
            ({"context_size": -1}, "context_size=...): must be an integer of at least 0; got -1."),
        )
    ),
    *(
        (
            lambda given=given: jaxode.nn.Residual(2, 4, 1, key=KEY, context_size=3)(*given), kind,
            "Residual(" + said,
        )
        for given, kind, said in (
            (
                (0.0, ONE, ONE), ValueError,
                "context_size=3): the context of a sample must be a vector of this size, and None "
                "for size 0; got shape (2,). Pass such a context, or leave it out.",
            ),
            (
                (0.0, jnp.ones(3), jnp.ones(3)), TypeError,
                "event_shape=...): the network was made for samples of 2 numbers; got a sample of "
                "shape (3,). Make it with event_shape=(3,), or fix the samples.",
            ),
            (
                (0.0, ONE, NETWORK), TypeError,
                "t, y, context): the context must be a vector; got a network. For a vector field "
                "whose params are the network, pass f=jaxode.nn.field.",
            ),
        )
    ),
    (
        lambda: jaxode.flow(jaxode.nn.field, X, 0.0, 1.0, jaxode.nn.MLP(3, key=KEY)), TypeError,
        "MLP(event_shape=...): the network was made for samples of 3 numbers; got a sample of "
        "shape (2,). Make it with event_shape=(2,), or fix the samples.",
    ),
    (
        lambda: NETWORK(0.0, ONE, NETWORK), TypeError,
        "MLP(t, y, context): the context must be a vector; got a network. For a vector field "
        "whose params are the network, pass f=jaxode.nn.field.",
    ),
    (
        lambda: solve(adjoint=jaxode.DiscreteAdjoint), TypeError,
        "solve(adjoint=...): must be a gradient method such as jaxode.DiscreteAdjoint(); got "
        "<class 'jaxode.ode.adjoints.discrete.DiscreteAdjoint'>.",
    ),
    (
        lambda: cnf().sample(None, KEY, 3, context=jnp.ones((4, 1))), ValueError,
        "sample(context=...): leaves must have a leading axis of 3, one row per sample; got shape "
        "(4, 1). To give all samples the same row, pass jnp.broadcast_to(row, (3, *row.shape)).",
    ),
    (
        lambda: cnf().sample(None, None, 3), TypeError,
        "sample(key=...): must be a key of jax.random; got NoneType. Pass jax.random.key(0).",
    ),
    (
        lambda: cnf().sample(KEY, NETWORK, 3), TypeError,
        "sample(key=...): must be a key of jax.random; got MLP. Pass jax.random.key(0).",
    ),
    (
        lambda: cnf().sample_and_log_prob(KEY, ONE, 3), TypeError,
        "sample_and_log_prob(key=...): must be a key of jax.random; got ArrayImpl. "
        "Pass jax.random.key(0).",
    ),
    (
        lambda: cnf().log_prob(None, X, key=3), TypeError,
        "log_prob(key=...): must be a key of jax.random; got int. Pass jax.random.key(0).",
    ),
    (
        lambda: cnf().log_prob_and_error(None, X, key=3), TypeError,
        "log_prob_and_error(key=...): must be a key of jax.random; got int. "
        "Pass jax.random.key(0).",
    ),
    (
        lambda: cnf().nll(None, X, key=3), TypeError,
        "nll(key=...): must be a key of jax.random; got int. Pass jax.random.key(0).",
    ),
    (
        lambda: jax.jvp(lambda x: cnf().nll(None, x), (X,), (X,)), TypeError,
        "DiscreteAdjoint: can't apply forward-mode differentiation (jax.jvp, jax.jacfwd) to this "
        "gradient method, which has reverse mode (jax.grad, jax.vjp). Use "
        "adjoint=jaxode.ForwardMode().",
    ),
    (
        lambda: solve(solver=jaxode.Rodas5P), TypeError,
        "solve(solver=...): must be an ODE solver, such as diffrax.Tsit5() or jaxode.Rodas5P(); "
        "got the class Rodas5P. Call it: Rodas5P().",
    ),
    (
        lambda: solve(solver=jaxode.Rodas5P(lambda t, y, args: -y)), ValueError,
        "solve(solver=...): jacobian(t, y, args) must return the shape (2, 2), for the 2 numbers "
        "in the state of one sample; got (2,). Entry [i, j] is the derivative of number i of f by "
        "number j of y.",
    ),
    (
        lambda: solve(solver=jaxode.Rodas5P(lambda t, y, args: "text")), TypeError,
        "solve(solver=...): jacobian(t, y, args) must return a floating array; got str. "
        "Stack numbers by jnp.array.",
    ),
    (
        lambda: solve(solver=jaxode.Rodas5P(lambda t, y, args: [[t, 0.0], [0.0, -1.0]])), TypeError,
        "solve(solver=...): jacobian(t, y, args) must return a floating array; got list. "
        "Stack numbers by jnp.array.",
    ),
    (
        lambda: solve(solver=jaxode.Rosenbrock23(lambda t, y, args: args["rate"])), TypeError,
        "jacobian(t, y, args): the Jacobian raised TypeError: 'NoneType' object is not "
        "subscriptable. It got y=f64[2] and args=None. Pass args that fit jacobian, or fix the "
        "line of jacobian that the error above names.",
    ),
    (
        lambda: jaxode.Rodas5P(jacobian=1.0), TypeError,
        "Rodas5P(jacobian=...): must be a function jacobian(t, y, args); got 1.0. The default is "
        "forward mode.",
    ),
    (
        lambda: cnf(solver=jaxode.Rosenbrock23(decay)), ValueError,
        "cnf(solver=...): integrates more than the field; got Rosenbrock23(jacobian=...). Leave "
        "jacobian out.",
    ),
    (
        lambda: jaxode.audit(cnf(), None, jnp.ones((4, 3)), KEY), ValueError,
        "audit(x=...): must have shape [batch, 2]; got (4, 3).",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "exception", "message"), BAD_INPUT, ids=[row[2][:60] for row in BAD_INPUT]
)
def test_bad_input(call, exception, message):
    with pytest.raises(exception) as info:
        call()
    assert str(info.value) == message


# (arguments of a solve, exception, start of the message), of what only resembles the arguments.
ALIKE = [
    ({"y0": np.ma.ones(2)}, TypeError, r"solve\(y0=...\).*masked array"),
    ({"y0": True}, TypeError, r"solve\(y0=...\).*bool"),
    ({"y0": jax.random.key(0)}, TypeError, r"solve\(y0=...\).*key<fry>"),
    ({"y0": [1.0, 2.0]}, TypeError, r"solve\(y0="),
    ({"y0": np.array(["a"])}, TypeError, r"solve\(y0="),
    ({"t1": 10**30}, TypeError, r"solve\(t1=...\)"),
    ({"t0": False}, TypeError, r"solve\(t0=...\)"),
    ({"t1": np.datetime64("2021")}, TypeError, r"solve\(t1=...\)"),
    ({"rtol": 10**30}, TypeError, r"solve\(rtol=...\)"),
    ({"ts": []}, ValueError, r"solve\(ts=...\).*shape \(0,\)"),
    ({"ts": 0.5}, ValueError, r"solve\(ts=...\).*shape \(\)"),
    ({"ts": [0.1, np.nan]}, ValueError, r"solve\(ts=...\): times must increase .* 0.1 before nan"),
    ({"t1": 0.1, "ts": np.float32([0.1])}, ValueError, r"solve\(ts=.*t1=0.1; got 0.10000000149"),
    ({"t1": 0.0, "ts": [0.1]}, ValueError, r"solve\(ts=...\)"),
    ({"ts": np.array([False, True])}, TypeError, r"solve\(ts=...\)"),
    ({"throw": "x"}, TypeError, r"solve\(throw="),
    ({"args": np.array(["a", "b"])}, TypeError, r"solve\(args="),
    ({"args": {"a": np.array([None])}}, TypeError, r"solve\(args="),
    ({"breakpoints": "0.5"}, TypeError, r"solve\(breakpoints=...\): "),
    ({"breakpoints": jnp.array([0.5j])}, TypeError, r"solve\(breakpoints=...\): "),
    ({"breakpoints": 0.5}, ValueError, r"solve\(breakpoints=...\): "),
    ({"breakpoints": jnp.ones((2, 1))}, ValueError, r"solve\(breakpoints=...\): "),
    ({"breakpoints": (0.5, jnp.nan)}, ValueError, r"solve\(breakpoints=...\): "),
    ({"breakpoints": (0.5,), "steps": 4}, ValueError, r"solve\(breakpoints=...\): "),
]


@pytest.mark.parametrize(("given", "exception", "start"), ALIKE, ids=str)
def test_what_resembles_an_argument_of_a_solve(given, exception, start):
    with pytest.raises(exception, match="^" + start):
        solve(**given)


OF_ODEINT = {"func": lambda y, t, *args: -y, "y0": ONE, "t": jnp.array([0.0, 1.0])}


@pytest.mark.parametrize(
    ("run", "given", "argument"),
    [
        (jaxode.odeint, OF_ODEINT | {"t": None}, "t"),
        (jaxode.odeint, OF_ODEINT | {"t": "ab"}, "t"),
        (lambda args: jaxode.odeint(*OF_ODEINT.values(), args), {"args": np.array(["a"])}, "args"),
        (flow, {"z": [[1.0], [2.0]]}, "z"),
        (flow, {"throw": None}, "throw"),
    ],
)
def test_what_resembles_an_argument(run, given, argument):
    with pytest.raises(TypeError, match=rf"^(odeint|flow)\({argument}="):
        run(**given)
