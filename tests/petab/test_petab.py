"""Problems of PEtab: the likelihood of a small one, its gradient, its estimate, and bad input."""

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import libsbml
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.stats import kstest, laplace, norm, truncnorm, uniform

import jaxode
from jaxode.petab.formulas import Names, degree_in_time, evaluate, parsed
from jaxode.petab.observables import Observable, placeholders_of
from jaxode.petab.parameters import Parameters
from jaxode.petab.sbml_field import ModelField
from jaxode.petab.sbml_model import read_model

# Two species in a compartment of size 2, of which A is fed until t = 3. B is an amount.
REACTIONS = {
    "turn": ("A", "B", "volume * rate(A, k)"),
    "decay": ("B", None, "part * slow * B"),
    "feed": (None, "A", "volume * dose * piecewise(1, time < until, 0)"),
}
PARAMETERS = """
parameterId parameterScale lowerBound upperBound nominalValue estimate
k           log10          0.01       100        0.8          1
slow        lin            0          10         0.3          1
scale       log            0.1        10         1.5          1
noise       log10          0.001      10         0.2          1
high        lin            0          5          2.0          0
noiseParameter1 lin        0          5          0.0          0
"""
CONDITIONS = """
conditionId dose A   until
before      0.5  -   1e9
low         1.0  -   3
high        high 3.0 3
"""
OBSERVABLES = """
observableId observableFormula noiseFormula observableTransformation noiseDistribution
amount observableParameter1_amount*B noise+noiseParameter1 log10 normal
total A*volume+B noiseParameter1_total+0.1*A lin laplace
"""
MEASUREMENTS = """
preequilibrationConditionId simulationConditionId observableId time measurement \
observableParameters noiseParameters
before low  amount 0   2.0 scale -
before low  amount 2   4.0 scale -
before low  amount 2   4.5 2.0   -
before low  total  2   5.0 -     noise
before low  total  6   2.0 -     0.3
before high amount 4   7.0 scale -
-      high total  4   7.5 -     noise
-      high total  inf 6.1 -     noise
"""
FILES = {
    "parameters.tsv": PARAMETERS,
    "conditions.tsv": CONDITIONS,
    "observables.tsv": OBSERVABLES,
    "measurements.tsv": MEASUREMENTS.replace("\\\n", ""),
}
YAML = """
format_version: 1
parameter_file: parameters.tsv
problems:
- sbml_files: [model.xml]
  condition_files: [conditions.tsv]
  observable_files: [observables.tsv]
  measurement_files: [measurements.tsv]
"""


# Of the same model, from its own start, without pre-equilibration and without a switch: solves by
# an explicit method compile in a second. There are two measurements at one time, and priors of each
# kind.
SMALL = {
    "parameters.tsv": """
parameterId parameterScale lowerBound upperBound nominalValue estimate objectivePriorType \
objectivePriorParameters initializationPriorType initializationPriorParameters
k     log10 0.01  100 0.8 1 parameterScaleNormal 0.1;0.2  normal                0.8;0.01
slow  lin   0     10  0.3 1 -                    -        parameterScaleUniform 0.2;0.4
scale log   0.1   10  1.5 1 normal               1.4;0.1  uniform               1;2
noise log10 0.001 10  0.2 0 -                    -        -                     -
""",
    "conditions.tsv": "conditionId\nalone",
    "observables.tsv": """
observableId observableFormula noiseFormula observableTransformation noiseDistribution
amount scale*B noise log10 normal
""",
    "measurements.tsv": """
observableId simulationConditionId measurement time
amount alone 1.7 0.5
amount alone 1.4 1
amount alone 2.0 1
amount alone 1.1 2
amount alone 0.4 4
""",
}
SMALL = {name: text.replace("\\\n", "") for name, text in SMALL.items()}


def model(reactions: Mapping[str, tuple[Any, Any, str]] = REACTIONS) -> str:
    """The model in SBML."""
    document = libsbml.SBMLDocument(3, 1)
    made = document.createModel()
    formula = lambda text: libsbml.parseL3Formula(text)
    definition = made.createFunctionDefinition()
    definition.setId("rate")
    definition.setMath(formula("lambda(x, by, x * by)"))
    compartment = made.createCompartment()
    compartment.setId("volume")
    compartment.setConstant(True)
    compartment.setSize(2.0)
    for name, by_amount in (("A", False), ("B", True)):
        species = made.createSpecies()
        species.setId(name)
        species.setCompartment("volume")
        species.setHasOnlySubstanceUnits(by_amount)
        species.setBoundaryCondition(False)
        species.setConstant(False)
        species.setInitialAmount(1.0)
    assignment = made.createInitialAssignment()
    assignment.setSymbol("B")
    assignment.setMath(formula("2 * A"))
    for name, value in {"k": 1.0, "slow": 1.0, "dose": 0.0, "until": 3.0}.items():
        parameter = made.createParameter()
        parameter.setId(name)
        parameter.setConstant(True)
        parameter.setValue(value)
    for name, (reactant, product, law) in reactions.items():
        reaction = made.createReaction()
        reaction.setId(name)
        reaction.setReversible(False)
        reaction.setFast(False)
        for side, of in ((reaction.createReactant, reactant), (reaction.createProduct, product)):
            if of:
                reference = side()
                reference.setSpecies(of)
                reference.setStoichiometry(1.0)
                reference.setConstant(True)
        kinetic = reaction.createKineticLaw()
        kinetic.setMath(formula(law))
        local = kinetic.createLocalParameter()
        local.setId("part")
        local.setValue(2.0)
    return libsbml.writeSBMLToString(document)


def written(folder: Path, change: Mapping[str, tuple[str, str]] = {}, tables=FILES) -> Path:
    """A problem in `folder`, with one text for another in some of its files."""
    fed = {name: each for name, each in REACTIONS.items() if tables is FILES or name != "feed"}
    files = {"problem.yaml": YAML, "model.xml": model(fed)}
    for name, text in tables.items():
        lines = ["\t".join(line.split()) for line in text.strip().splitlines()]
        files[name] = "\n".join(re.sub("(?<!\\S)-(?!\\S)", "", line) for line in lines)
    for name, text in files.items():
        if name in change:
            assert change[name][0] in text
            text = text.replace(*change[name])
        (folder / name).write_text(text)
    return folder / "problem.yaml"


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return jaxode.petab.load(written(tmp_path_factory.mktemp("petab")))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = written(tmp_path_factory.mktemp("petab"), tables=SMALL)
    table = path.parent / "parameters.tsv"
    # As a spreadsheet writes it, with a mark at the beginning and spaces around the words.
    head, *lines = table.read_text().splitlines()
    lines = [line.replace("\t", " \t ") for line in lines]
    table.write_text("\ufeff" + "\n".join([head, *lines]), encoding="utf-8")
    return jaxode.petab.load(path, solver=diffrax.Tsit5())


@pytest.fixture(scope="module")
def small_nll_and_gradient(small):
    return jax.jit(jax.value_and_grad(small.nll))


def states(p: dict[str, float], start: list[float], dose: float, until: float, t: float):
    """Concentration of A and amount of B at time t, by SciPy."""

    def slope(_, y, feed):
        return [feed - p["k"] * y[0], 2 * p["k"] * y[0] - 2 * p["slow"] * y[1]]

    y, reached = np.array(start), 0.0
    for end, feed in ((min(t, until), dose), (t, 0.0)):
        if end > reached:
            options = {"method": "LSODA", "rtol": 1e-10, "atol": 1e-12, "args": (feed,)}
            y, reached = solve_ivp(slope, (reached, end), y, **options).y[:, -1], end
    return y


def starts_by_hand(p: dict[str, float]) -> dict[str, tuple[list[float], float]]:
    """The state of each row at time 0, and its dose."""
    settled = [0.5 / p["k"], 0.5 / p["slow"]]
    return {"low": (settled, 1.0), "high": ([3.0, settled[1]], 2.0), "alone": ([3.0, 6.0], 2.0)}


def by_hand(p: dict[str, float]) -> float:
    """Minus the log-likelihood."""
    rows = starts_by_hand(p)
    amounts = [
        ("low", 2.0, 0, p["scale"]), ("low", 4.0, 2, p["scale"]), ("low", 4.5, 2, 2.0),
        ("high", 7.0, 4, p["scale"]),
    ]  # fmt: skip
    totals = [
        ("low", 5.0, 2, p["noise"]), ("low", 2.0, 6, 0.3), ("alone", 7.5, 4, p["noise"]),
        ("alone", 6.1, 1e3, p["noise"]),
    ]  # fmt: skip
    total = 0.0
    for row, measured, t, factor in amounts:
        _, b = states(p, *rows[row], 3.0, t)
        total -= norm.logpdf(np.log10(measured), np.log10(factor * b), p["noise"])
        total += np.log(measured * np.log(10))
    for row, measured, t, noise in totals:
        a, b = states(p, *rows[row], 3.0, t)
        total -= laplace.logpdf(measured, 2 * a + b, noise + 0.1 * a)
    return total


NOMINAL = {"k": 0.8, "slow": 0.3, "scale": 1.5, "noise": 0.2}


def test_the_likelihood_is_that_of_scipy(problem):
    assert problem.names == list(NOMINAL)
    # Of eight measurements, with solves at a relative tolerance of 1e-8.
    np.testing.assert_allclose(problem.nll(problem.nominal), by_hand(NOMINAL), rtol=1e-6)
    moved = problem.nominal | {"k": jnp.asarray(0.1), "scale": jnp.asarray(-0.2)}
    linear = NOMINAL | {"k": 10**0.1, "scale": np.exp(-0.2)}
    np.testing.assert_allclose(problem.nll(moved), by_hand(linear), rtol=1e-6)


def compare_with_finite_differences(of, nll_and_gradient):
    gradient = nll_and_gradient(of.nominal)[1]
    for name in of.names:
        up, down = (
            nll_and_gradient(of.nominal | {name: of.nominal[name] + step})[0]
            for step in (1e-4, -1e-4)
        )
        # The solves of both differ by some 1e-7, which 2e-4 divides.
        np.testing.assert_allclose(gradient[name], (up - down) / 2e-4, rtol=1e-3, atol=1e-3)


@pytest.mark.slow  # compiles the gradient of two implicit solves, 20 seconds
def test_its_gradient_is_that_of_finite_differences(problem):
    compare_with_finite_differences(problem, jax.jit(jax.value_and_grad(problem.nll)))


def test_a_small_likelihood_is_that_of_scipy_and_has_its_gradient(small, small_nll_and_gradient):
    nll = 0.0
    for line in SMALL["measurements.tsv"].strip().splitlines()[1:]:
        measured, t = map(float, line.split()[2:])
        b = states(NOMINAL, [0.5, 1.0], 0.0, 0.0, t)[1]
        nll -= norm.logpdf(np.log10(measured), np.log10(1.5 * b), 0.2)
        nll += np.log(measured * np.log(10))
    # Of five measurements, with solves at a relative tolerance of 1e-8.
    np.testing.assert_allclose(small_nll_and_gradient(small.nominal)[0], nll, rtol=1e-6)
    compare_with_finite_differences(small, small_nll_and_gradient)


EVENT = (
    '<listOfEvents><event id="pulse" useValuesFromTriggerTime="true"><trigger initialValue="true" '
    'persistent="true"><math xmlns="http://www.w3.org/1998/Math/MathML"><true/></math></trigger>'
    "</event></listOfEvents></model>"
)
SINE = (
    '<apply> <sin/> <csymbol encoding="text" '
    'definitionURL="http://www.sbml.org/sbml/symbols/time"> t </csymbol> </apply>'
)
TURNS = SINE.replace("<csymbol", "<apply> <times/> <cn> 2 </cn> <pi/> <csymbol").replace(
    "</csymbol>", "</csymbol> </apply>"
)
TURN = libsbml.writeMathMLToString(libsbml.parseL3Formula(REACTIONS["turn"][2]))
TURN = "\n".join(" " * 10 + line for line in TURN.splitlines()[1:])
BAD = {
    "a missing table": (
        "problem.yaml", "observables.tsv", "other.tsv", "observable_files must be .*other",
    ),
    "no table": ("problem.yaml", "condition_f", "more_f", "must have condition_files; got none"),
    "a version": ("problem.yaml", "version: 1", "version: 2", "version 1; got version 2"),
    "a missing column": ("observables.tsv", "noiseFormula", "x", "the column 'noiseFormula'"),
    "a parameter": ("measurements.tsv", "scale", "gain", "must hold numbers .*got 'gain'"),
    "a name in a formula": ("observables.tsv", "*volume", "*size", "got 'size' in 'total'"),
    "a formula": ("observables.tsv", "A*volume", "A*(volume", "must be of numbers, names and"),
    "two comparisons": ("observables.tsv", "A*volume", "(1<A<2)", "numbers at a time; got ..1<A"),
    "a logarithm of three": (
        "observables.tsv", "A*volume", "log(A,2,3)", r"jaxode.petab reads; got 'log\(A, 2, 3\)'",
    ),
    "the largest of none": ("observables.tsv", "A*volume", "max()", r"reads; got 'max\(\)'"),
    "a condition": ("measurements.tsv", "low", "lower", "got 'lower'. Add it"),
    "an observable": ("measurements.tsv", "total", "all", "got 'all'. Add it"),
    "a column": ("conditions.tsv", "dose", "drug", "got the column 'drug'"),
    "no override": ("measurements.tsv", "0.3", "", "none for 'noiseParameter1_total' at time 6"),
    "a scale": ("parameters.tsv", "log10", "log2", "one of lin, log, log10; got 'log2'"),
    "a distribution": ("observables.tsv", "laplace", "cauchy", "got 'cauchy' for 'total'"),
    "an event": ("model.xml", "</model>", EVENT, r"without events \(pulse\), which"),
    "no YAML": ("problem.yaml", "problems:", "problems", "must be the YAML file of a PEtab"),
    "a parameter twice": ("parameters.tsv", "slow", "k", "parameterId must be unique; got 'k' 2"),
    "a condition twice": ("conditions.tsv", "before", "low", "Id must be unique; got 'low' 2"),
    "a word for yes": ("parameters.tsv", "0.8\t1", "0.8\tyes", "estimate must be .*'yes' for 'k'"),
    "a decimal comma": ("measurements.tsv", "7.5", "7,5", "numbers; got '7,5' for 'total'. Mend"),
    "no number": ("measurements.tsv", "7.5", "", "must be finite, and not empty; got '' for"),
    "an infinite number": ("measurements.tsv", "7.5", "inf", "must be finite, .*got 'inf' for 't"),
    "no condition": ("measurements.tsv", "before\tlow", "before\t", "table; got ''. Add it"),
    "another observable": (
        "observables.tsv", "A*volume", "amount", "got 'amount' in 'total'. Write the formula of th",
    ),
    "noise of another observable": (
        "observables.tsv", "noise+", "total+", "got 'total' in 'amount'. Write the formula of that",
    ),
    "its own observable": ("observables.tsv", "A*volume", "total", "got 'total' in 'total'. Write"),
    "no identifier": ("parameters.tsv", "slow", "", "parameterId must not be empty; got a line"),
    "neither yes nor no": ("parameters.tsv", "0.8\t1", "0.8\t", "must be 0 or 1; got '' for 'k'"),
    "a law without a formula": ("model.xml", TURN, "", "formulas must not be empty; got one"),
    "no mapping": ("problem.yaml", "sbml_files: [model.xml]", "model.xml", "the YAML file of a"),
    "no names of files": ("problem.yaml", "[model.xml]", "3", "sbml_files must be names .*got 3"),
    "a logarithm of zero": ("measurements.tsv", "7.0", "0.0", "positive .*got '0.0' for 'amount'"),
    "a time before": ("measurements.tsv", "4\t7.5", "-4\t7.5", "negative.*got '-4' for 'total'"),
    "crossed bounds": ("parameters.tsv", "0.001\t", "11\t", "order, .*'11' and '10' for 'noise'"),
    "a bound of a logarithm": ("parameters.tsv", "0.01\t", "-1\t", "logarithms; got '-1' and"),
    "a bound of zero": ("parameters.tsv", "0.01\t", "0\t", "logarithms; got '0' and '100' for 'k'"),
    "no value": ("parameters.tsv", "2.0\t0", "\t0", "not estimated; got none for 'high'"),
    "an estimated switch": ("conditions.tsv", "1e9", "k", "known times; got switches at times th"),
    "a sine of time": ("model.xml", "<ci> until </ci>", SINE, "got a relation of another function"),
    "periodic switches": (  # as if linear at whole numbers
        "model.xml", "<ci> until </ci>", TURNS, "got a relation of another function of time",
    ),
    "two problems": ("problem.yaml", "problems:", "problems:\n- {}", "'?1'? and 2 problems"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_named(case, tmp_path):
    file, *change, message = BAD[case]
    with pytest.raises(ValueError, match=r"^petab.load\(path=\.\.\.\): .*" + message):
        jaxode.petab.load(written(tmp_path, {file: tuple(change)}))


def test_other_wrong_arguments(problem, tmp_path):
    with pytest.raises(ValueError, match="must be a file; got"):
        jaxode.petab.load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="must be the YAML file of a PEtab problem"):
        jaxode.petab.load(tmp_path)
    header = FILES["measurements.tsv"].strip().splitlines()[0]
    (written(tmp_path).parent / "measurements.tsv").write_text("\t".join(header.split()))
    with pytest.raises(ValueError, match="must have measurements; got an empty table"):
        jaxode.petab.load(tmp_path / "problem.yaml")
    for name, text in (("parameters.tsv", ""), ("conditions.tsv", "\n"), ("observables.tsv", "")):
        (written(tmp_path).parent / name).write_text(text)
        with pytest.raises(ValueError, match=rf"^petab.load.*{name} must have the column .* \[\]"):
            jaxode.petab.load(tmp_path / "problem.yaml")
    fixed = (written(tmp_path).parent / "parameters.tsv").read_text().replace("\t1", "\t0")
    (tmp_path / "parameters.tsv").write_text(fixed)
    with pytest.raises(ValueError, match="estimate must be 1 for at least one parameter; got none"):
        jaxode.petab.load(tmp_path / "problem.yaml")
    (written(tmp_path).parent / "model.xml").write_text(model({}))
    with pytest.raises(ValueError, match="must have a species that a reaction changes"):
        jaxode.petab.load(tmp_path / "problem.yaml")
    with pytest.raises(TypeError, match=r"load\(jumps=...\): is not an option"):
        jaxode.petab.load(tmp_path / "none.yaml", jumps=None)
    with pytest.raises(ValueError, match="Laplace's noise must be that of all"):
        problem.estimate(problem.starts(jax.random.key(0), 1))
    with pytest.raises(ValueError, match=r"nll\(params=...\): must have the names .* \['k'\]"):
        problem.nll({name: problem.nominal[name] for name in problem.names[1:]})
    with pytest.raises(TypeError, match=r"nll\(params=...\): must be a dictionary .* got ndarray"):
        problem.nll(np.zeros(len(problem.names)))
    with pytest.raises(TypeError, match=r"Problem.starts\(key=...\)"):
        problem.starts(0, 3)
    with pytest.raises(ValueError, match=r"Problem.starts\(n=...\)"):
        problem.starts(jax.random.key(0), 0)


def test_a_condition_starts_at_the_steady_state_of_another(tmp_path):
    """Where it does not set a state itself. With derivatives in forward mode, by a solver that
    compiles faster: the end is the same."""
    problem = jaxode.petab.load(written(tmp_path), solver=jaxode.Rosenbrock23(), rtol=1e-6)
    start, moves = jax.jit(lambda p: (problem.y0(p), jax.jacfwd(problem.y0)(p)))(problem.nominal)
    rows = starts_by_hand(NOMINAL).values()
    # At a steady state, no error of the steps is left.
    np.testing.assert_allclose(start, [y for y, _ in rows], rtol=1e-6)
    by_k, by_slow = np.zeros((2, 3, 2))
    by_k[0, 0] = -0.5 / NOMINAL["k"] * np.log(10)  # by its logarithm to base 10
    by_slow[:2, 1] = -0.5 / NOMINAL["slow"] ** 2
    for name, expected in {"k": by_k, "slow": by_slow, "scale": 0 * by_k}.items():
        np.testing.assert_allclose(moves[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_parts_of_an_estimate_have_the_same_likelihood(problem):
    """The field and the channels of observations, as `estimate` gets them, of exact states."""
    channels, ts, params = problem._channels, problem._measurements.ts, problem.nominal
    rows = starts_by_hand(NOMINAL).values()
    ys = [[states(NOMINAL, *row, 3.0, t) for t in each] for row, each in zip(rows, ts, strict=True)]

    def parts(ts, ys, params):
        field = lambda y, row: problem.f(jnp.asarray(1.0), y, (params, row))
        of_time = jax.vmap(
            lambda t, y, row: channels.observe_with_noise(t, y, (params, row)), (0, 0, None)
        )
        predicted = jax.vmap(of_time)(ts, ys, problem.row_args)
        observed = jnp.stack([channels.ys, channels.ys], axis=-1)
        of_each = channels.log_density(predicted, observed, params)
        return jax.vmap(field)(ys[:, 0], problem.row_args), jnp.nansum(of_each)

    slopes, log_density = jax.jit(parts)(jnp.asarray(ts), jnp.asarray(ys), params)
    for slope, y, (_, dose) in zip(slopes, ys, rows, strict=True):
        a, b = y[0]
        expected = [dose - 0.8 * a, 2 * 0.8 * a - 2 * 0.3 * b]
        np.testing.assert_allclose(slope, expected, rtol=1e-12)
    # The states have a relative error of 1e-10.
    np.testing.assert_allclose(channels.shift - log_density, by_hand(NOMINAL), rtol=1e-6)


NORMAL = {"observables.tsv": ("+0.1*A\tlin\tlaplace", "\tlin\tnormal")}


@pytest.mark.slow  # compiles a search with implicit solves, 20 seconds
def test_an_estimate_is_likelier_than_its_start(tmp_path):
    problem = jaxode.petab.load(written(tmp_path, NORMAL), solver=jaxode.Rosenbrock23())
    starts = {name: value[None] for name, value in problem.nominal.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eight measurements, few steps
        found = problem.estimate(starts, steps=5, rtol=1e-5)
    assert found.nll < problem.nll(problem.nominal) - 0.1
    # Solves of the estimate have a tolerance of 1e-5.
    np.testing.assert_allclose(found.nll, problem.nll(found.params), rtol=1e-3)


def test_an_estimate_has_the_largest_product_of_likelihood_and_priors(
    small, small_nll_and_gradient
):
    starts = {name: value[None] for name, value in small.nominal.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # five measurements
        estimate = small.estimate(starts, rtol=1e-8)
    nll, gradient = small_nll_and_gradient(estimate.params)
    np.testing.assert_allclose(estimate.nll, nll, rtol=1e-6)
    of_priors = lambda p: sum(0.5 * residual**2 for residual in small.prior(p).values())
    for name, slope in jax.grad(of_priors)(estimate.params).items():
        # The search ends where the cost changes by some 1e-8 of itself.
        np.testing.assert_allclose(gradient[name] + slope, 0.0, atol=1e-2, err_msg=name)
    assert not np.isclose(gradient["k"], 0.0, atol=0.1)


def test_priors_are_normal_on_their_scales(small):
    params = {"k": jnp.asarray(-0.3), "slow": jnp.asarray(0.3), "scale": jnp.asarray(0.5)}
    residuals = small.prior(params)
    assert set(residuals) == {"k", "scale"}
    np.testing.assert_allclose(residuals["k"], (-0.3 - 0.1) / 0.2, rtol=1e-12)
    np.testing.assert_allclose(residuals["scale"], (np.exp(0.5) - 1.4) / 0.1, rtol=1e-12)


def test_starts_are_drawn_by_the_priors_of_initialization(small):
    starts = {name: np.asarray(each) for name, each in small.starts(jax.random.key(0), 400).items()}
    k, scale = 10 ** starts["k"], np.exp(starts["scale"])
    # Five standard errors of 400 draws.
    assert abs(k.mean() - 0.8) < 5 * 0.01 / 20
    assert abs(k.std() / 0.01 - 1) < 5 / 800**0.5
    for drawn, low, high in ((starts["slow"], 0.2, 0.4), (scale, 1.0, 2.0)):
        assert low <= drawn.min() < drawn.max() <= high
        assert abs((drawn.mean() - low) / (high - low) - 0.5) < 5 * 12**-0.5 / 20


def test_nominal_values_and_bounds_are_on_the_scales_of_the_table(problem):
    expected = {"k": np.log10(0.8), "slow": 0.3, "scale": np.log(1.5), "noise": np.log10(0.2)}
    for name, value in expected.items():
        np.testing.assert_allclose(problem.nominal[name], value, rtol=1e-12)
    low, high = problem.bounds
    assert (float(low["slow"]), float(high["slow"])) == (0.0, 10.0)
    np.testing.assert_allclose((low["noise"], high["noise"]), (-3.0, 1.0), rtol=1e-12)


def test_starts_are_within_bounds_and_drawn_by_the_table(problem):
    starts, (low, high) = problem.starts(jax.random.key(0), 50), problem.bounds
    for name in problem.names:
        assert starts[name].shape == (50,)
        assert low[name] <= starts[name].min() < starts[name].max() <= high[name]
    assert float(high["k"]) == 2.0
    assert float(low["scale"]) == pytest.approx(np.log(0.1))


FORMULAS = {
    "a ** 2 / (1 + a^-1)": 8 / 3, "piecewise(1, a > 3, 2, a >= 2, 3)": 2.0, "-a": -2.0,
    "piecewise(1, a > 1, 2, a >= 2, 3)": 1.0, "piecewise(1, a > 3, 2, a > 4, 3)": 3.0,
    "log10(10 * a / 2)": 1.0, "log(exp(a)) + ln(1)": 2.0, "log(16, 4)": 2.0,
    "sqrt(a + 2) + root(3, 8)": 4.0, "min(a, b, 1) - max(b, 0)": -4.0,
    "abs(-a) * pow(a, 3) + time": 23.0, "piecewise(1, a == 2 && !(b < 1), 0)": 1.0,
    "floor(2.5) + ceil(2.5)": 5.0, "2 ^ 3 ^ 2 - a ^ 2 / 4": 511.0,
    "piecewise(1, true || true && false, 0)": 0.0,
}  # fmt: skip
# All functions of PEtab's formulas, as sympy defines them: with arguments, and their values. Only
# `piecewise`, above, has others.
OF_PETAB = {
    "log": [((8.0, 2.0), 3.0), ((0.5, 0.25), 0.5), ((10.0, 100.0), 0.5), ((3.0,), math.log(3))],
    "log10": [((0.01,), -2.0)], "log2": [((8.0,), 3.0)], "ln": [((3.0,), math.log(3))],
    "exp": [((-2.0,), math.exp(-2))], "sqrt": [((2.25,), 1.5)], "abs": [((-2.0,), 2.0)],
    "sign": [((-2.0,), -1.0), ((0.0,), 0.0), ((3.0,), 1.0)], "pow": [((2.0, -3.0), 0.125)],
    "min": [((2.0, -3.0), -3.0)], "max": [((2.0, -3.0), 2.0)],
    **{name: [((0.7,), getattr(math, name)(0.7))] for name in ("sin", "cos", "tan")},
    **{name: [((0.7,), getattr(math, name)(0.7))] for name in ("sinh", "cosh", "tanh")},
    "sec": [((0.7,), 1 / math.cos(0.7))], "sech": [((0.7,), 1 / math.cosh(0.7))],
    "csc": [((0.7,), 1 / math.sin(0.7))], "csch": [((0.7,), 1 / math.sinh(0.7))],
    "cot": [((0.7,), 1 / math.tan(0.7))], "coth": [((0.7,), 1 / math.tanh(0.7))],
    "arcsin": [((0.7,), math.asin(0.7))], "arcsinh": [((0.7,), math.asinh(0.7))],
    "arccos": [((0.7,), math.acos(0.7))], "arccosh": [((1.7,), math.acosh(1.7))],
    "arctan": [((0.7,), math.atan(0.7))], "arctanh": [((0.7,), math.atanh(0.7))],
    "arcsec": [((1.7,), math.acos(1 / 1.7))], "arcsech": [((0.7,), math.acosh(1 / 0.7))],
    "arccsc": [((1.7,), math.asin(1 / 1.7))], "arccsch": [((0.7,), math.asinh(1 / 0.7))],
    "arccot": [((0.7,), math.pi / 2 - math.atan(0.7)), ((-0.7,), math.atan(-1 / 0.7)),
               ((0.0,), math.pi / 2)],
    "arccoth": [((1.7,), math.atanh(1 / 1.7))],
}  # fmt: skip
OF_PETAB = [(name, *row) for name, rows in OF_PETAB.items() for row in rows]


# A parameter on a scale, of which `normal` and `uniform` priors are of its numbers.
LINE = {"parameterId": "k", "parameterScale": "log10", "lowerBound": "0.01", "upperBound": "10"}
LINE |= {"nominalValue": "1", "estimate": "1"}


def of_prior(kind, given, of="initialization", **line):
    line |= {f"{of}PriorType": kind, f"{of}PriorParameters": given}
    return Parameters([LINE | line])


STARTS = {  # the distribution of the numbers, or of their logarithms to base 10
    ("normal", "0.1;1"): truncnorm(-0.09, 9.9, 0.1, 1.0),
    ("parameterScaleNormal", "0;2"): truncnorm(-1.0, 0.5, 0.0, 2.0),
    ("uniform", ""): uniform(0.01, 9.99),
    ("uniform", "-1;2"): uniform(0.01, 1.99),
    ("parameterScaleUniform", ""): uniform(-2, 3),
    ("", ""): uniform(-2, 3),
}


@pytest.mark.parametrize(("kind", "given"), STARTS)
def test_starts_are_those_of_a_prior_within_the_bounds(kind, given):
    drawn = np.asarray(of_prior(kind, given).starts(jax.random.key(0), 400)["k"])
    assert np.isfinite(drawn).all()
    drawn = 10**drawn if kind in ("normal", "uniform") else drawn
    assert kstest(drawn, STARTS[kind, given].cdf).pvalue > 1e-3


BAD_PRIORS = [
    ("normal", "", "a mean and a deviation above 0, as '1;2'; got '' for 'k'"),
    ("parameterScaleNormal", "1;0", "a mean and a deviation above 0, as '1;2'; got '1;0' for 'k'"),
    ("normal", "nan;1", "a mean and a deviation above 0"),
    ("uniform", "1", "two ends in order, as '1;2'; got '1' for 'k'"),
    ("uniform", "2;1", "two ends in order"),
    ("uniform", "1;2;3", "two ends in order"),
    ("parameterScaleUniform", "1;x", "two ends in order"),
]


@pytest.mark.parametrize(("kind", "given", "words"), BAD_PRIORS)
def test_a_prior_without_its_parameters(kind, given, words):
    with pytest.raises(ValueError, match=f"initializationPriorParameters must be {words}"):
        of_prior(kind, given).starts(jax.random.key(0), 1)
    with pytest.raises(ValueError, match=f"objectivePriorParameters must be {words}"):
        of_prior(kind, given, "objective").prior({"k": jnp.zeros(())})


def test_starts_without_bounds():
    with pytest.raises(ValueError, match=r"bounds must be finite to draw .*0.01 and inf for 'k'"):
        of_prior("uniform", "", upperBound="inf").starts(jax.random.key(0), 1)


DEGREES = {
    "time - 3": 1, "2 * time / a + b": 1, "exp(a) * (b - time)": 1, "a * b": 0, "step": 0,
    "piecewise(a, time < 2, 0) + 1": 0, "sin(2 * pi * time)": None, "time * time": None,
    "time ^ 2": None, "a / time": None, "piecewise(time, a > 1, 0)": None, "step * time": 1,
    "1 - wave": None, "abs(time - 3)": None,
}  # fmt: skip


def test_a_switch_is_at_a_linear_function_of_time():
    rules = {"step": parsed("piecewise(1, time > 4, 0)"), "wave": parsed("cos(time)")}
    for text, degree in DEGREES.items():
        assert degree_in_time(parsed(text), rules) == degree, text


def test_a_state_that_does_not_come_to_rest(problem, tmp_path):
    """Without its decay, B grows in a pre-equilibration, and up to a time of infinity."""
    drifts = problem.nominal | {"slow": jnp.zeros(())}
    with pytest.warns(UserWarning, match="that of 'before' still moves, and the likelihood is NaN"):
        assert jnp.isnan(problem.nll(drifts))
    fed = {"measurements.tsv": ("before", ""), "conditions.tsv": ("3.0\t3", "3.0\t1e9")}
    fed = jaxode.petab.load(written(tmp_path, fed), solver=jaxode.Rosenbrock23(), rtol=1e-4)
    with pytest.warns(UserWarning, match="that of 'high' still moves, and the likelihood is NaN"):
        assert jnp.isnan(fed.nll(drifts))
    assert jnp.isfinite(fed.nll(problem.nominal))


def test_finite_times_are_kept_and_infinity_is_later(tmp_path):
    change = {"measurements.tsv": ("4\t7.5", "3e9\t7.5")}
    measurements = jaxode.petab.load(written(tmp_path, change))._measurements
    np.testing.assert_array_equal(measurements.ts[2], [3e9, 3e10, 3e10])
    np.testing.assert_array_equal(measurements.rests, [False, False, True])


def test_a_prior_that_is_not_known(tmp_path):
    text = (written(tmp_path).parent / "parameters.tsv").read_text()
    lines = [f"{line}\tcauchy" for line in text.splitlines()]
    lines[0] = lines[0].replace("cauchy", "initializationPriorType")
    (tmp_path / "parameters.tsv").write_text("\n".join(lines))
    problem = jaxode.petab.load(tmp_path / "problem.yaml")
    with pytest.raises(ValueError, match=r"^Problem.starts: initializationPriorType must be .*'k'"):
        problem.starts(jax.random.key(0), 1)


def test_functions_of_formulas():
    calls = [f"{name}({', '.join('xy'[: len(numbers)])})" for name, numbers, _ in OF_PETAB]
    rows = [dict(zip("xy", numbers, strict=False)) for _, numbers, _ in OF_PETAB]

    @jax.jit
    def values(rows):
        return [evaluate(parsed(call), row) for call, row in zip(calls, rows, strict=True)]

    for (*call, expected), value in zip(OF_PETAB, values(rows), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-14, err_msg=str(call))
    for text in ("log(100, 10)", "log (log(16, 2), 2)", "log2(4)", "-sign(-2) - log10(0.1)"):
        np.testing.assert_allclose(evaluate(parsed(text), {}), 2.0, rtol=1e-14, err_msg=text)


def test_formulas():
    for text, value in FORMULAS.items():
        names = Names({"b": parsed("a + 3")}, {"a": 2.0}.__getitem__, time=7.0)
        np.testing.assert_allclose(evaluate(parsed(text), names), value, rtol=1e-14, err_msg=text)


# Amounts and concentrations in a compartment of size 2, with a rate rule and an assignment rule.
# The laws of the first reaction and the last have one form, and the one between them another.
KINDS = """<?xml version="1.0" encoding="UTF-8"?>
<sbml xmlns="http://www.sbml.org/sbml/level3/version1/core" level="3" version="1"><model>
<listOfCompartments><compartment id="cell" size="2" constant="true"/></listOfCompartments>
<listOfSpecies>
<species id="S" initialConcentration="3" hasOnlySubstanceUnits="true" FREE/>
<species id="U" initialAmount="4" hasOnlySubstanceUnits="false" FREE/>
<species id="held" initialConcentration="5" hasOnlySubstanceUnits="false" FREE/>
</listOfSpecies>
<listOfParameters>
<parameter id="p" value="0.5" constant="true"/>
<parameter id="q" value="7" constant="false"/><parameter id="r" constant="false"/>
</listOfParameters>
<listOfRules>
<rateRule variable="q">MATH<apply><minus/><apply><times/><ci>p</ci><ci>q</ci></apply></apply></math>
</rateRule>
<assignmentRule variable="r">MATH<apply><plus/><ci>p</ci><ci>q</ci></apply></math></assignmentRule>
</listOfRules>
<listOfReactions>
<reaction id="bind" SIMPLE><listOfReactants>2 S</listOfReactants>
<listOfProducts>1 U</listOfProducts>
<kineticLaw>MATH<apply><times/><ci>r</ci><ci>S</ci></apply></math></kineticLaw></reaction>
<reaction id="part" SIMPLE><listOfReactants>1 U 1 held</listOfReactants>
<kineticLaw>MATH<apply><power/><ci>U</ci><cn>2</cn></apply></math></kineticLaw></reaction>
<reaction id="leave" SIMPLE><listOfReactants>1 S</listOfReactants>
<kineticLaw>MATH<apply><times/><ci>p</ci><ci>S</ci></apply></math></kineticLaw></reaction>
</listOfReactions></model></sbml>"""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    text = KINDS.replace("MATH", '<math xmlns="http://www.w3.org/1998/Math/MathML">')
    text = text.replace("FREE", 'compartment="cell" boundaryCondition="HELD" constant="false"')
    text = text.replace("HELD", "false", 2).replace("HELD", "true")
    text = text.replace("SIMPLE", 'reversible="false" fast="false"')
    text = re.sub(
        r"\b(\d) (S|U|held)\b",
        r'<speciesReference species="\2" stoichiometry="\1" constant="true"/>',
        text,
    )
    path = tmp_path_factory.mktemp("sbml") / "kinds.xml"
    path.write_text(text)
    return read_model(path)


def test_amounts_concentrations_and_rules_of_a_model(kinds):
    assert kinds.states == ("S", "U", "q")
    np.testing.assert_array_equal(
        kinds.stoichiometry, [[-2, 0, -1, 0], [1, -1, 0, 0], [0, 0, 0, 1]]
    )
    names = Names(kinds.rules | kinds.initial, lambda _: None, time=0.0)
    expected = {"S": 6.0, "U": 2.0, "held": 5.0, "q": 7.0, "r": 7.5, "bind": 45.0}
    assert {name: names[name] for name in expected} == expected


def test_a_field_is_the_sum_of_the_laws(kinds):
    """Those of one form are computed together, in another order."""
    field = jax.jit(ModelField(kinds, ["p", "cell", "held"]))
    (s, u, q), p = (1.5, 3.0, 2.0), 0.4
    slope = field(jnp.asarray(0.0), jnp.asarray([s, u, q]), jnp.asarray([p, 2.0, 5.0]))
    bind, part, leave = (p + q) * s, u**2, p * s
    expected = [-2 * bind - leave, (bind - part) / 2, -p * q]
    np.testing.assert_allclose(slope, expected, rtol=1e-12)


def test_measurements_give_several_placeholders_in_order():
    names = "noiseParameter1_x", "observableParameter1_x", "observableParameter2_x"
    observable = Observable("x", 0.0, 1.0, "lin", "normal", names)
    line = {"observableParameters": "first; second", "noiseParameters": "third", "time": "1"}
    assert placeholders_of(line, observable) == ["third", "first", "second"]


@pytest.mark.benchmarks
def test_the_benchmark_reads_a_clone(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.cases import petab

    folder = tmp_path / "Benchmark-Models" / "small"
    folder.mkdir(parents=True)
    written(folder)
    petab.main(["--data", str(tmp_path)])
    assert f"| small | 4 | {by_hand(NOMINAL):.4f} |  |" in capsys.readouterr().out
