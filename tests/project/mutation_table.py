"""The faults that `mutations.py` plants: a file of jaxode, a text that it has once, a wrong one.

A user could suffer from each: a wrong number, gradient, mask or message, or an error that is not
raised. Each folder with logic has at least four.
"""

# Where to look, first by the longest of these that a file of jaxode starts with.
FIRST = {
    "": ("tests",),
    "_checks": ("tests/test_inputs.py", "tests/test_not_finite.py"),
    "_checks/errors": ("tests/ode/test_failures.py", "tests/flows/test_bad_data.py"),
    "_checks/traced": ("tests/ode/test_failures.py",),
    "_checks/samples": (
        "tests/flows/test_cnf.py",
        "tests/flows/test_bad_data.py",
        "tests/test_inputs.py",
    ),
    "_jax": ("tests/_jax",),
    "_jax/modes": ("tests/_jax/test_modes.py",),
    "_jax/tangents": (
        "tests/_jax/test_tangents.py",
        "tests/ode/test_jumps.py",
        "tests/ode/test_steady.py",
        "tests/ode/test_events.py",
    ),
    "_jax/vmap_rule": ("tests/ode/test_vmap.py", "tests/test_transforms.py"),
    "auditing": ("tests/auditing",),
    "calibration": ("tests/calibration",),
    "coupling": ("tests/flows/test_coupling.py",),
    "density": ("tests/density",),
    "density/contexts": ("tests/density/test_context.py", "tests/density/test_embed.py"),
    "density/density": ("tests/density/test_density.py", "tests/density/test_support.py"),
    "density/maps": ("tests/density/test_standardize.py",),
    "density/maps/some_columns": ("tests/flows/test_torus.py", "tests/tabular/test_periodic.py"),
    "density/maps/box": ("tests/density/test_support.py",),
    "density/maps/chain": ("tests/density/test_support.py",),
    "density/maps/of_": ("tests/interop/test_interop.py",),
    "training/trials": (
        "tests/training/test_trials.py",
        "tests/training/test_ensembles.py",
    ),
    "training/fit": ("tests/training/test_fit.py", "tests/training/test_trials.py"),
    "training/dataset": ("tests/training/test_dataset.py",),
    "training/loop": ("tests/training/test_fit.py", "tests/training/test_trials.py"),
    "training/steps": ("tests/training/test_fit.py", "tests/training/test_trials.py"),
    "training/turns": ("tests/training/test_trials.py", "tests/training/test_ensembles.py"),
    "flows/diffusion": ("tests/flows/test_probability_flow.py",),
    "flows/bases": ("tests/flows/test_distributions.py", "tests/flows/test_nn.py"),
    "divergence": ("tests/flows/test_divergence.py",),
    "flows": ("tests/flows/test_flow_features.py", "tests/flows"),
    "flows/matching": ("tests/flows/test_matching.py", "tests/flows/test_torus.py"),
    "flows/periods": ("tests/flows/test_torus.py",),
    "flows/embedding": ("tests/density/test_embed.py",),
    "flows/chunks": ("tests/flows/test_chunks.py",),
    "flows/centered": ("tests/flows/test_distributions.py",),
    "flows/nll": ("tests/flows/test_flow_features.py", "tests/flows/test_bad_data.py"),
    "images": ("tests/test_images.py",),
    "interop": ("tests/interop/test_interop.py",),
    "nn": ("tests/flows/test_nn.py",),
    "nn/deep_set": ("tests/density/test_embed.py",),
    "saving": ("tests/saving",),
    "ode": ("tests/ode",),
    "ode/adjoints": ("tests/ode/test_adjoints.py", "tests/ode/test_discrete.py"),
    "ode/adjoints/backsolve": ("tests/ode/test_backsolve.py",),
    "ode/adjoints/base": ("tests/ode/test_failed_gradients.py",),
    "ode/adjoints/discrete": ("tests/ode/test_dense.py",),
    "ode/bolza": ("tests/flows/test_flow_features.py", "tests/flows/test_bad_data.py"),
    "ode/dense": ("tests/ode/test_dense.py",),
    "ode/events": ("tests/ode/test_events.py",),
    "ode/field": ("tests/test_inputs.py",),
    "ode/options": ("tests/ode/test_failures.py",),
    "ode/quadrature": ("tests/flows/test_flow_features.py", "tests/flows/test_bad_data.py"),
    "ode/pieces": ("tests/ode/test_jumps.py", "tests/ode/test_breakpoints.py"),
    "ode/loop/crossing": ("tests/ode/test_events.py",),
    "ode/loop/integrate": ("tests/ode/test_events.py",),
    "ode/loop/outputs": ("tests/ode/test_events.py", "tests/ode/test_solve.py"),
    "ode/loop/initial_value_problem": ("tests/ode/test_breakpoints.py",),
    "ode/loop/trajectory": ("tests/ode/test_discrete.py", "tests/ode/test_rows.py"),
    "ode/loop/step_tangents": ("tests/ode/test_discrete.py", "tests/ode/test_adjoints.py"),
    "ode/loop/checkpoints": ("tests/ode/test_discrete.py",),
    "ode/loop/acceptance": ("tests/ode/test_failures.py", "tests/ode/test_step_size.py"),
    "ode/solvers/explicit": (
        "tests/ode/test_tolerances.py",
        "tests/flows/test_flow_features.py",
    ),
    "ode/solvers/linear": ("tests/ode/test_linear.py", "tests/ode/test_stiff.py"),
    "ode/solvers/rosenbrock": (
        "tests/ode/test_rosenbrock.py",
        "tests/ode/test_mass.py",
        "tests/ode/test_stiff.py",
    ),
    "ode/loop/step_size": ("tests/ode/test_step_size.py", "tests/ode/test_tolerances.py"),
    "ode/mass": ("tests/ode/test_mass.py",),
    "ode/odeint": ("tests/ode/test_odeint.py",),
    "ode/steady": ("tests/ode/test_steady.py",),
    "ode/roots": ("tests/ode/test_steady.py",),
    "ode/interpolations": ("tests/ode/test_interpolations.py",),
    "estimation": ("tests/estimation",),
    "estimation/observed/bounds": (
        "tests/estimation/test_reports.py",
        "tests/estimation/test_likelihoods.py",
    ),
    "training/budget": ("tests/estimation/test_reports.py",),
    "estimation/search/progress_lines": (
        "tests/estimation/test_reports.py",
        "tests/estimation/test_estimate.py",
    ),
    "estimation/estimate": ("tests/estimation/test_reports.py",),
    "estimation/best_fit": ("tests/estimation/test_reports.py",),
    "estimation/observed/likelihoods": ("tests/estimation/test_likelihoods.py",),
    "estimation/populations/marginal": ("tests/estimation/test_population.py",),
    "estimation/populations/maximum": ("tests/estimation/test_population.py",),
    "estimation/search/objectives": ("tests/estimation/test_objectives.py",),
    "estimation/observed/observations": (
        "tests/estimation/test_objectives.py",
        "tests/estimation/test_estimate.py",
    ),
    "estimation/populations/population": ("tests/estimation/test_population.py",),
    "estimation/populations/population_arguments": ("tests/estimation/test_population.py",),
    "estimation/populations/new_subject": ("tests/estimation/test_population.py",),
    "estimation/populations/population_profile": ("tests/estimation/test_population.py",),
    "_jax/compile_time": ("tests/_jax/test_compile_time.py",),
    "estimation/prediction": (
        "tests/estimation/test_reports.py",
        "tests/estimation/test_estimate.py",
    ),
    "estimation/observed/observed_system": (
        "tests/estimation/test_objectives.py",
        "tests/estimation/test_population.py",
    ),
    "estimation/profiles": ("tests/estimation/test_estimate.py",),
    "estimation/search/levenberg_marquardt": ("tests/estimation/test_search.py",),
    "estimation/search/slopes": (
        "tests/estimation/test_objectives.py",
        "tests/estimation/test_estimate.py",
    ),
    "estimation/populations/pooled": ("tests/estimation/test_population.py",),
    "estimation/search/starts": (
        "tests/estimation/test_search.py",
        "tests/estimation/test_objectives.py",
    ),
    "estimation/observed/tolerances": (
        "tests/estimation/test_objectives.py",
        "tests/estimation/test_population.py",
    ),
    "estimation/uncertainty": ("tests/estimation/test_reports.py",),
    "ode/system": ("tests/ode/test_rows.py",),
    "petab": ("tests/petab",),
    "plot": ("tests/test_plot.py",),
    "series": ("tests/series",),
    "sklearn": ("tests/interop/test_sklearn.py",),
    "tabular": ("tests/tabular",),
    "tabular/encoding": ("tests/tabular/test_columns.py", "tests/tabular/test_table.py"),
    "tabular/impute": ("tests/tabular/test_table.py",),
    "tabular/columns/column": ("tests/tabular/test_columns.py",),
    "tabular/predictions/several_grids": ("tests/tabular/test_predictions.py",),
    "tabular/predictions/predictive": ("tests/tabular/test_predictions.py",),
    "regularizers": ("tests/flows/test_flow_features.py",),
    "training/files": ("tests/training/test_files.py",),
}

MUTATIONS: tuple[tuple[str, str, str], ...] = (
    # A message names the rows that did not fail.
    ("_checks/errors.py", "{in_rows(codes)}", "{in_rows(codes == 0)}"),
    # A message blames arguments that keep their rule.
    ("_checks/rules.py", "return ~self.holds(*jax.lax", "return self.holds(*jax.lax"),
    # Inside `jit`, negative weights count as zero.
    ("_checks/samples.py", "jnp.where(weights >= 0, weights, jnp.nan)",
     "jnp.where(weights >= 0, weights, 0)"),
    # The weights of a mean are rounded to half precision.
    ("_checks/samples.py", "jnp.full(batch, 1 / batch, state_dtype(x))",
     "jnp.full(batch, 1 / batch, x.dtype)"),
    # The line of an error is one of JAX, not of the user.
    ("_checks/traced.py", "if not frame.filename.startswith(LIBRARIES)", "if frame.filename"),
    # A field in the order of SciPy is solved with time and state exchanged.
    ("ode/field.py", "if kinds in ([[True, False], [False, True]], ", "if kinds in ("),
    # Steps of float32 that measure rounding run out, with advice to take more.
    ("ode/options.py", "FEW_ROUNDINGS = 4", "FEW_ROUNDINGS = 0"),
    # A span that float32 loses is solved as an empty one.
    ("_checks/times.py", "> 1e-3 * span\n", "> 1e3 * span\n"),
    # The transposed solve forgets the scale of the rows.
    ("ode/solvers/linear.py", "return scale * x if transposed else x", "return x"),
    # A changed closure finds the program of the old one.
    ("_jax/closure.py", "return tuple(map(_cell_contents, value.__closure__ or ()))", "return ()"),
    # All devices draw the noise of the first.
    ("_jax/sharding.py", "first = jax.lax.axis_index(axes) * x.shape[0] if axes else 0",
     "first = 0"),
    # NaN derivatives of a change that did not happen reach the gradient.
    ("_jax/tangents.py", "return jnp.where(needed, x, jax.lax.stop_gradient(x))", "return x"),
    # The tangent of a gradient forgets its point, cotangents are exchanged, and the cotangent of a
    # gradient is the gradient.
    ("_jax/modes.py", "    if not any(along_inputs):", "    if True:"),
    ("_jax/modes.py", "bars_of, dots_of = _value", "dots_of, bars_of = _value"),
    ("_jax/modes.py", "by_input, outputs = _pushed(swept, along, inputs, bars_again)",
     "by_input, outputs = swept(inputs)"),
    # A sweep without a record, of several cotangents, is mapped twice.
    ("_jax/modes.py", "            return function.sweep(perturbed, touched, inputs, bars)",
     "            return back.value([*inputs, *bars])"),
    # Callbacks and exchanges between mapped rows are lost.
    ("_jax/modes.py", "(program.out_avals, program.effects)", "(program.out_avals, set())"),
    # What rows share gets the cotangent of the first row, and directions are taken for rows.
    ("_jax/modes.py", "return [bar.sum(0) if one else bar", "return [bar[0] if one else bar"),
    ("_jax/modes.py", "dots = [jnp.moveaxis(dot, 0, lanes) for dot in dots]", "dots = [*dots]"),
    # Tangents of a tree move to the leaves before those that are zero.
    ("_jax/tangents.py", "return structure.flatten_up_to(tangent(*trees))",
     "return [*jax.tree.leaves(tangent(*trees)), *[None] * count][:count]"),
    # The times of steps do not move with the ends, between which dense output is evaluated.
    ("ode/adjoints/flat.py", "steps = steps._replace(times=True, y=True, k=True)",
     "steps = steps._replace(y=True, k=True)"),
    # Outputs at the end do not move with the end in second derivatives.
    ("ode/adjoints/backsolve.py", "weight = jnp.where(start == end, span, 0)",
     "weight = jnp.where(start == end, 0 * span, 0)"),
    # The gradient of the loss is that of the loss alone, whatever depends on the loss.
    ("ode/bolza.py",
     "return [bar * bars[0].astype(bar.dtype) for bar in gradient]", "return gradient"),
    # Wrong under `jax.vmap` with `in_axes=1`.
    ("_jax/vmap_rule.py", "else jax.numpy.moveaxis(x, axis, 0)", "else x"),
    # The reference of all errors is as loose as what it judges.
    ("auditing/audited_flow.py", "tolerance = 1e-10 if", "tolerance = 1e-2 if"),
    # A sample of density zero stands in for the others.
    ("auditing/audited_flow.py", "jnp.argmin(self.outside)", "jnp.argmax(self.outside)"),
    # Samples that do not fit their density pass.
    ("auditing/base.py", "IMBALANCE = 6.0", "IMBALANCE = 600.0"),
    # A right divergence with probes is condemned for its noise.
    ("auditing/divergence_audit.py", "- 5 * noise, 0.0)", "+ 5 * noise, 0.0)"),
    # Ranks are those from above, so that faults have the wrong sign.
    ("calibration/ranks.py", "samples < theta[None]", "samples > theta[None]"),
    # Posteriors that are too narrow seem too wide.
    ("calibration/regions.py", "of_draws > of_truth[None]", "of_draws < of_truth[None]"),
    ("calibration/regions.py", "u[:, None] <= levels[None]", "u[:, None] >= levels[None]"),
    # Right posteriors fail.
    ("calibration/uniformity.py", "2 * np.arange(1, DEGREES + 1) + 1",
     "4 * np.arange(1, DEGREES + 1)"),
    # Each half of the rows holds both samples.
    ("calibration/classifier.py", "np.repeat([0, 1], count)", "np.tile([0, 1], count)"),
    # Later parts of the simulations meet the contexts of the first.
    ("calibration/simulations.py", "lambda leaf, rows=rows: leaf[rows]",
     "lambda leaf, rows=rows: leaf[: len(self.theta[rows])]"),
    # Of a parameter that is constant, all distances are NaN.
    ("calibration/regions.py", "    if constant:", "    if False:"),
    # Regions that cover too little are said to cover too much.
    ("calibration/regions.py", '(("little", off < -3), ("much", off > 3))',
     '(("little", off > 3), ("much", off < -3))'),
    # The step that a flow uses most is not that which is judged.
    ("auditing/checks.py", "float(jnp.max(stats.num_steps))", "float(jnp.min(stats.num_steps))"),
    # An error in the gradient is told to be one of the step size alone.
    ("auditing/checks.py", "if not isinstance(adjoint, DiscreteAdjoint):",
     "if isinstance(adjoint, DiscreteAdjoint):"),
    # Two measurements at one time count as one.
    ("petab/channels.py", "repeats.get((row, time, key), -1) + 1", "0"),
    # Laplace's noise is taken for normal noise, and the other way round.
    ("petab/channels.py", 'np.repeat([kind == "laplace"', 'np.repeat([kind != "laplace"'),
    # What a condition sets is lost where it follows another.
    ("petab/experiments.py", "continued[:, i] &= self.rows.empty",
     "continued[:, i] |= self.rows.empty"),
    # An empty cell of a condition is NaN.
    ("petab/experiments.py", "jnp.where(jnp.isnan(cell), default, cell)", "cell"),
    # A switch at an estimated time is missed, and biases the gradient.
    ("petab/experiments.py", "np.any(np.asarray(moves)[..., self.parameters.estimated] != 0)",
     "np.any(np.asarray(moves)[..., ~self.parameters.estimated] != 0)"),
    # Steps do not end at a periodic switch, which is not refused.
    ("petab/formulas.py", "linear.get(formula.function) else None", "formula.function else None"),
    # Laws of one form that are not beside each other change others' states.
    ("petab/sbml_field.py", "model.stoichiometry[:, order]", "model.stoichiometry"),
    # A concentration changes as fast as an amount.
    ("petab/sbml_field.py", " / numbers[self._sizes]", ""),
    # The last condition that holds decides, instead of the first.
    ("petab/formulas.py", "reversed(range(0, len(args) - 1, 2))", "range(0, len(args) - 1, 2)"),
    ("petab/formulas.py", "jnp.log(x) / jnp.log(base)", "jnp.log(base) / jnp.log(x)"),
    # SBML has the base of a logarithm first, PEtab second.
    ("petab/formulas.py", "(*base, x)) if base", "(x, *base)) if base"),
    ("petab/formulas.py", "_reciprocal(getattr(jnp, inverse))",
     "getattr(jnp, inverse)"),
    # An observable has the measurements of others.
    ("petab/measurements.py", "place[which], measured[which]",
     "place[which], measured[: len(which)]"),
    # The logarithm of a measurement of zero makes all likelihoods NaN.
    ("petab/measurements.py", "(measured > 0) | ~logarithmic", "(measured >= 0) | ~logarithmic"),
    # Two molecules react as one.
    ("petab/sbml_model.py", "sign * reference.getStoichiometry()", "sign"),
    # An amount is taken for a concentration.
    ("petab/sbml_model.py", 'Formula("DIVIDE", (value, size))', "value"),
    # A model is solved without its events.
    ("petab/sbml_model.py", "if unread := list(_unread(model)):", "if unread := []:"),
    # Likelihoods of logarithmic observables lack the change of variables.
    ("petab/observables.py", "jnp.log(measured) + math.log(SCALES[self.scale])",
     "jnp.zeros_like(measured)"),
    ("petab/observables.py", "jnp.log(2 * noise)", "jnp.log(noise)"),
    # The second placeholder of a measurement has the value of the first.
    ("petab/observables.py", 'f"{kind}{i + 1}_{observable.name}": cell',
     'f"{kind}{i or 1}_{observable.name}": cell'),
    # A wide prior is a narrow one.
    ("petab/parameters.py", "(value - mean) / deviation", "(value - mean) * deviation"),
    # First guesses by a prior on the linear scale are not on that of the table.
    ("petab/parameters.py", "if linear and (rate", 'if kind == "" and (rate'),
    # First guesses leave the bounds, beyond which there is no logarithm.
    ("petab/parameters.py", "truncated_normal(subkey, left, right, (n,))",
     "normal(subkey, (n,))"),
    # A prior without its parameters has the bounds as its mean and deviation.
    ("petab/parameters.py", "not cell and kind in UNIFORM_PRIORS", "not cell"),
    # Natural logarithms count as those to base 10.
    ("petab/parameters.py", '"log": 1.0', '"log": math.log(10)'),
    # An estimate has another likelihood than `Problem.nll`.
    ("petab/petab_problem.py", "best.nll + channels.shift", "best.nll - channels.shift"),
    # An estimate forgets the priors of the table.
    ("petab/petab_problem.py", '{"prior": self.prior} if self.prior(self.nominal)',
     '{"prior": self.prior} if not self.prior(self.nominal)'),
    # A problem is solved from the start of the model, not from its steady state.
    ("petab/petab_problem.py",
     "jnp.where(self._continued, settled[experiments.before_of, 0], y0)", "y0"),
    # A state that drifts counts as steady.
    ("petab/petab_problem.py", "moving = rests & jnp.any(", "moving = ~rests & jnp.any("),
    # A finite time beyond 1e8 becomes that.
    ("petab/measurements.py", "np.where(at == np.inf, last, at)", "np.minimum(at, SETTLED_TIME)"),
    # A table that a spreadsheet has written lacks its first column.
    ("petab/tables.py", 'encoding="utf-8-sig"', 'encoding="utf-8"'),
    # Of conditions of one name, the last stands for all.
    ("petab/tables.py", "if names.count(name) > 1:", "if names.count(name) > len(names):"),
    # A shorter series ends at time zero.
    ("series/long_tables.py", "np.tile(times[stops - 1][:, None], (1, counts.max()))",
     "np.zeros((len(counts), counts.max()))"),
    # Lines of one time are not told from each other.
    ("series/long_tables.py", "np.lexsort((times, place))", 'np.argsort(place, kind="stable")'),
    # Densities of several channels lack a determinant.
    ("series/mixture.py", "log_det = log_det + 0.5 * jnp.log(square)", "pass"),
    # A channel that was not observed counts.
    ("series/mixture.py", "jnp.where(is_observed[None], 1 / self.sd, 0.0)", "1 / self.sd"),
    # Quantiles are those without what channels share.
    ("series/mixture.py", "return self.sd**2 + jnp.sum(self.loading**2, axis=1)[None]",
     "return self.sd**2"),
    # A level near 1 loses its digits.
    ("series/series_model.py", "np.stack([levels.ravel(), 1 - levels.ravel()], axis=1)",
     "np.stack([levels.ravel(), 1 - np.float32(levels.ravel())], axis=1)"),
    # Draws reach far beyond the range of training.
    ("series/mixture.py", "jnp.clip(ys[jnp.argmax(inside)], low, high)",
     "ys[jnp.argmax(inside)]"),
    # A density is not that in the units of the data.
    ("series/series_model.py", "nats - (readings.is_observed * np.log(self.units.sd))",
     "nats + (readings.is_observed * np.log(self.units.sd))"),
    # All draws of a row jump by no values.
    ("series/series_model.py", "network.jumped(state, mixture, y, jnp.ones(y.shape, bool)), y",
     "network.jumped(state, mixture, y, jnp.zeros(y.shape, bool)), y"),
    # A channel that was never seen has a recent value.
    ("series/series_model.py",
     "jnp.where(ever, jnp.exp(-state.since), 0.0)", "jnp.exp(-state.since)"),
    # An observation without a channel is one with its mean.
    ("series/series_network.py",
     "last = jnp.where(is_observed, y, state.last)", "last = y"),
    # A time without values changes the state.
    ("series/series_network.py",
     "jnp.where(is_observed.any(), self.jump(state.h, observed, key), state.h)",
     "self.jump(state.h, observed, key)"),
    # A jump counts its gap since the oldest of the last values.
    ("series/series_network.py", "since = jnp.min(state.since)", "since = jnp.max(state.since)"),
    # A time without values goes back from the last one.
    ("series/units.py", "np.where(blank, last_observed(ts, ys)[:, None], ts)",
     "np.minimum(ts, last_observed(ts, ys)[:, None])"),
    # The waves of the field turn half as far.
    ("series/series_network.py", "angle = jnp.exp(self.frequency) * (0.5 * step)",
     "angle = jnp.exp(self.frequency) * (0.25 * step)"),
    # A forecast does not decay to the mean.
    ("series/series_network.py", "self.recall * jnp.exp(-jnp.exp(self.forget) * state.since)",
     "self.recall"),
    # Training reads the values whose density it maximizes from what is set aside as gaps.
    ("series/fit_series.py", "partly = is_observed & jnp.where", "partly = jnp.where"),
    # A jump of the user takes the place of the field.
    ("series/fit_series.py", '"jump": ("jump", jump, (h, observed, None))',
     '"jump": ("jump", None, (h, observed, None))'),
    # What a training returns is its start.
    ("series/fit_series.py", "return run.best.with_params(plan.devices.from_all(run.best.params))",
     "return model.with_params(plan.devices.from_all(model.params))"),
    # Units of the data change what is learnt.
    ("series/units.py", "(np.where(is_observed, ys, self.mean) - self.mean) / self.sd",
     "np.where(is_observed, ys, self.mean) - self.mean"),
    # Times in a row may come before others.
    ("series/units.py", "(step < 0) | ((step == 0) & before_last)", "(step == 0) & before_last"),
    # A level that stays is forgotten.
    ("series/units.py", "np.exp(-np.exp(LOG_RECALL_RATES)[:, None] * wait) * y[first]",
     "np.exp(-np.exp(LOG_RECALL_RATES)[:, None] * t[second]) * y[first]"),
    # A network sees a context once for each sample.
    ("density/contexts.py", "or context is None or self.shapes is None:", "or True:"),
    # The gradient of a set with gaps is NaN.
    ("nn/deep_set.py", "x = jnp.where(present[:, None], points, 0.0)", "x = points"),
    # A point of which some numbers are missing counts.
    ("nn/deep_set.py", "jnp.isnan(points).any(axis=1)", "jnp.isnan(points).all(axis=1)"),
    # Squares of points far away overflow in float32.
    ("nn/deep_set.py", "FARTHEST = 1e16", "FARTHEST = 1e30"),
    # A set with infinite numbers has a vector.
    ("nn/deep_set.py", "jnp.where(jnp.isinf(x), jnp.nan, ", "jnp.where(False, jnp.nan, "),
    # Samples outside the support have the density of a stand-in.
    ("density/density.py", "jnp.where(inside & fits, log_prob,",
     "jnp.where(inside | fits, log_prob,"),
    ("density/contexts.py", "self.log_density(x, *row) - log_det",
     "self.log_density(x, *row) + log_det"),
    # A row with NaN has density zero.
    ("density/maps/chain.py", "inside |= jnp.isnan(x).any()", "pass"),
    # Training moves the units.
    ("density/maps/base.py", "jax.lax.stop_gradient(leaf).astype(x.dtype)", "leaf.astype(x.dtype)"),
    # The density is too large in the tails.
    ("density/maps/normal.py", "return z, jnp.sum(_log_slope(s, d0, d1, u) - tail)",
     "return z, jnp.sum(_log_slope(s, d0, d1, u))"),
    ("density/maps/box.py", "of_half = jnp.where(below, -u, u)",
     "of_half = jnp.where(below, u, -u)"),
    # `fit` trains on the rows that it sets aside.
    ("training/dataset.py", "_source_of(_chosen(rows, train), devices",
     "_source_of(_chosen(rows, np.arange(total)), devices"),
    # All members of an ensemble take the same batches.
    ("training/turns.py", "phase._replace(key=key)", "phase"),
    # All steps of a block see the same rows.
    ("training/steps.py", "jax.random.fold_in(key, i)", "jax.random.fold_in(key, 0)"),
    # Two neighbouring rows share their noise.
    ("flows/keys.py", "jax.random.fold_in(key, i))", "jax.random.fold_in(key, i // 2))"),
    # Wrong for times other than 0 and 1.
    ("flows/matching.py", "off = dz - (x - z0) / span", "off = dz - (x - z0)"),
    # Angles in degrees outweigh other numbers.
    ("flows/matching.py", "jnp.asarray(torus.radius.", "jnp.asarray((0 * torus.radius + 1)."),
    # A learned base shrinks to a point.
    ("flows/matching.py", "return jax.lax.stop_gradient(jnp.asarray(z0, x.dtype))",
     "return jnp.asarray(z0, x.dtype)"),
    ("flows/integrands.py", "jnp.sum(score * dz) + SCORE * div", "jnp.sum(score * dz) + div"),
    # Rows of a large batch come back in another order.
    ("flows/chunks.py", "leaf.swapaxes(0, 1).reshape(-1, *", "leaf.reshape(-1, *"),
    ("flows/centered.py", "div - jnp.trace(by_shift(jnp.zeros_like(z[0])))", "div"),
    # Running costs are negative.
    ("ode/quadrature.py", "[jnp.abs(weight)] * (count - 1)", "[weight] * (count - 1)"),
    # A row of weight zero that ends where the base has no density makes the loss NaN.
    ("ode/bolza.py", "unused | ((weights == 0) & ~jnp.isfinite(of_rows))", "unused"),
    # The gradient by the times forgets the sizes of the steps.
    ("ode/bolza.py", "swept.t0 + by_times[0], swept.t1 + by_times[1]",
     "swept.t0, swept.t1"),
    # Rows that fail are left out of the loss in silence.
    ("ode/bolza.py", "failed & (weights == 0) if result.shape",
     "failed if result.shape"),
    ("interop/to_numpyro.py", "return -self.map(self.held.forward, x)[1]",
     "return self.map(self.held.forward, x)[1]"),
    ("interop/to_numpyro.py", "self.map(self.held.inverse, y)[0]",
     "self.map(self.held.forward, y)[0]"),
    # NUTS leaves the support.
    ("interop/to_numpyro.py", "return _InSupport(self.density.support, self.event_shape)",
     "return constraints.independent(constraints.real, len(self.event_shape))"),
    # Each sample sees the conditions of all.
    ("interop/to_flowjax.py", "if condition is not None and self.cond_shape is None:",
     "if condition is not None and self.cond_shape == ():"),
    # Wrong for `ConcatSquash`.
    ("nn/networks.py", "slope if gate is None else slope * gate", "slope"),
    # A mirror image is off by one site.
    ("nn/lattice.py", "np.minimum(places, sizes - places)",
     "np.minimum(places, sizes - 1 - places)"),
    ("nn/particles.py", "return by_pairs + by_distance + ", "return by_pairs - by_distance + "),
    # Transposed samples pass.
    ("nn/base.py", "return shape in (self._shape, (size,))", "return math.prod(shape) == size"),
    # Samples far from the data overflow.
    ("nn/residual.py", "LARGEST_ACTIVATION * jnp.tanh(h / LARGEST_ACTIVATION)", "h"),
    # Wrong backwards in time, and so is the next one.
    ("ode/dense.py", "sign[None] * step_ends, piece_ends)", "step_ends, piece_ends)"),
    # Outputs beyond an event.
    ("ode/loop/outputs.py", "jnp.sign(problem.t1 - problem.t0)[None] * (problem.ts - t[None]) > 0",
     "problem.ts - t[None] > 0"),
    # A condition that jumps across zero is not reported.
    ("ode/loop/crossing.py", "jumps = (rate != 0) &", "jumps = (rate != rate) &"),
    # The step that crosses zero is taken as it is.
    ("ode/loop/crossing.py", "far = landed & (jnp.abs(move) > settled)", "far = landed & ~landed"),
    # A row with an event counts as having come to its end.
    ("ode/loop/integrate.py", "at_end = at_end & ~stopped", "at_end = at_end"),
    # The field sees the other side of a breakpoint.
    ("ode/loop/initial_value_problem.py", "jnp.where(t < lowest, lowest,",
     "jnp.where(t < lowest, t,"),
    # The next piece begins with the first step of a new solve.
    ("ode/pieces.py", "jnp.where(cut.counted & (h != 0), h, carry.h)", "jnp.nan * h"),
    # Padding of jumps counts.
    ("ode/pieces.py", "~jnp.isposinf(times)", "times == times"),
    # The second of two jumps at one time is dropped.
    ("ode/pieces.py", "~jnp.isposinf(times)",
     "~jnp.isposinf(times) & jnp.diff(times, axis=0, prepend=-jnp.inf).astype(bool)"),
    # NaN is no padding of jumps.
    ("_checks/times.py", "xp.where(xp.isnan(times), np.inf, times)", "times"),
    # A row with fewer output times loses its last one.
    ("ode/system.py", ".astype(jnp.int32) + 1\n", ".astype(jnp.int32)\n"),
    # The largest step is ignored.
    # The transpose of a step forgets that of its mass matrix.
    ("ode/solvers/rosenbrock.py", "self.mass if transposed else self.mass.T", "self.mass.T"),
    ("ode/steady.py", "jnp.where(root.singular, Result.SINGULAR_MATRIX.value, code)", "code"),
    # The search ends in its own units.
    ("ode/steady.py", "settled.y1 * sizes, settled", "settled.y1, settled"),
    # The natural size of what starts at zero stays tiny.
    ("ode/roots.py", "CREEP**3 * peak", "peak"),
    # Gradients of what was not found are zero.
    ("ode/roots.py", "jnp.where(ok, 0.0, touched)", "0.0"),
    # One unstable direction of three is none.
    ("ode/roots.py", "jnp.abs(jnp.trace(sign) + n) < 0.5", "jnp.trace(sign) < 0"),
    # Rows that are set aside are drawn.
    ("training/files.py", "at = rows + np.searchsorted(before, rows, side=\"right\")", "at = rows"),
    # Matching goes the long way around a circle.
    ("flows/matching.py", "x if torus is None else z0 + torus.arc(x - z0)", "x"),
    # Couplings measure angles along the line.
    ("flows/bases.py", "radius * jnp.sin(phase), radius * jnp.cos(phase)", "radius * phase"),
    # A field of differences of angles needs no period.
    ("flows/periods.py", "np.eye(count)", "np.ones((count, count))"),
    # Every activation is elementwise.
    ("_jax/elementwise.py", "elif equation.primitive.name not in LINEAR", "elif not flags"),
    # Maps move angles.
    ("density/maps/some_columns.py", "return not set(columns) & set(self.columns)", "return True"),
    # The last cell of a circle reaches into the first.
    ("tabular/columns/column.py", "high = np.minimum(high, self.circle.end)", "pass"),
    # An interpolation may end before the solve.
    ("ode/interpolations.py", "(low < first_knot - margin) | (high > last_knot + margin)",
     "low < first_knot - margin"),
    # What a profile holds moves.
    ("estimation/profiles.py", "np.where(self.chosen, starts, bound)", "bound + 0 * starts"),
    # The distance to a value is not made up for.
    ("estimation/profiles.py", "aims = aims - np.nan_to_num(distance)", "aims = aims"),
    # A search steps beyond an upper bound of a population.
    ("estimation/populations/maximum.py", "np.clip(theta + along, self.lower, self.upper) - theta",
     "np.maximum(theta + along, self.lower) - theta"),
    # A parameter at a bound is estimated as if it could go on.
    ("estimation/populations/maximum.py", "return (self.lower == self.upper) | down | up",
     "return (self.lower == self.upper) & (down | up)"),
    # A population begins where a guess is, although all subjects as one say better.
    ("estimation/populations/population.py", "and not start.value <= total.value",
     "and start.value < -np.inf"),
    # An interrupt loses the best so far.
    ("estimation/populations/maximum.py", "            if trial is None:\n                break",
     "            if trial is None:\n                return 0 * theta"),
    # The gradient is as if the effects of a subject stayed.
    ("estimation/populations/marginal.py", "score[:count] + down @ moves",
     "score[:count]"),
    # A start that was replaced counts where it was.
    ("estimation/search/levenberg_marquardt.py", "fits[start] = Fits(", "fits[row] = Fits("),
    ("estimation/search/levenberg_marquardt.py", "jnp.all(~search.cut & (", "jnp.all(("),
    ("estimation/search/starts.py", "if not with_starts:", "if False:"),
    # Runs that are misled by the first observations take their starts with them.
    ("estimation/search/starts.py", "np.full(len(search.starts), np.isinf(fits.costs).all())",
     "np.full(len(search.starts), False)"),
    # A start that costs less than the end of its run is dropped.
    ("estimation/search/starts.py", "(starts[alone], end) < costs[alone]",
     "(starts[alone], end) < -np.inf"),
    # Errors of others are as if a parameter at its bound were movable.
    ("estimation/uncertainty.py", "np.where(movable, np.nan_to_num(jacobian), 0.0)",
     "np.nan_to_num(jacobian)"),
    # The score of the noise is as if the residuals were one.
    ("estimation/search/objectives.py", "append(down_noise /", "append(0 * down_noise /"),
    # Observations that are missing count.
    ("estimation/observed/observed_system.py",
     "return early & ~jnp.isnan(self.ys)", "return early & True"),
    # No part of the observations comes first.
    ("estimation/search/starts.py",
     "PARTS_OF_TIMES[min(number, len(PARTS_OF_TIMES) - 1)] * len(times)",
     "len(times)"),
    ("estimation/uncertainty.py", "covariance = scale * inverse", "covariance = inverse"),
    # A start above its upper bound is taken.
    ("estimation/observed/bounds.py", "(starts < lower) | (starts > upper)", "starts < lower"),
    # Messages and tables call all numbers of an array by one name.
    ("estimation/observed/bounds.py", '"".join(f"[{i}]" for i in at)', '""'),
    # A second Ctrl-C does not end a search that hangs.
    ("training/budget.py", "            if self.interrupted:\n                raise\n", ""),
    # Ctrl-C ends the part of the observations alone, and the search goes on.
    ("training/budget.py", "return 0.0 if self.interrupted else max(", "return max("),
    # The end by Ctrl-C is blamed on seconds.
    ("training/budget.py", '"Ctrl-C" if self.interrupted', '"Ctrl-C" if False'),
    # A search that failed is shown as one that has converged.
    ("estimation/search/progress_lines.py",
     "'converged' if converged else", "'converged' if True else"),
    # Two digits of an estimate are shown.
    ("estimation/search/progress_lines.py", "DIGITS = 5", "DIGITS = 2"),
    # Criteria do not count the noise that the residuals say.
    ("estimation/best_fit.py", "square / degrees, parameters + 1",
     "square / degrees, parameters"),
    # A search has converged wherever it ends.
    ("estimation/best_fit.py", "gain < SAME_NATS * fit.scale", "gain < np.inf"),
    ("estimation/best_fit.py", "if not converged and is_vague", "if False and is_vague"),
    # What is left to gain is in directions of rounding, too.
    ("estimation/uncertainty.py", "determined = values > max(values[0], 1e-30) * tiny",
     "determined = values > 0"),
    # A parameter that equal bounds fix counts as one.
    ("estimation/best_fit.py", "parameters = int(search.bounds.movable.sum())",
     "parameters = len(flat)"),
    ("estimation/observed/observations.py", "int(bounds.movable.sum()))",
     "flats.shape[1])"),
    # A band as if parameters at a bound were known.
    ("estimation/estimate.py", "self.params, self._unbounded", "self.params, self.covariance"),
    # Predictions extrapolate inputs.
    ("estimation/prediction.py", 'check_knots("ts", problem.args, (problem.t0, jnp.max(times)))',
     "pass"),
    ("estimation/prediction.py",
     'check_knots("ts", problem.row_args, (problem.t0, times[..., -1]))', "pass"),
    # A parameter at its upper bound has an error as if it were movable.
    ("estimation/best_fit.py", " | (fit.flat >= np.asarray(bounds.upper))", ""),
    # Ends that are far less likely are told as likely.
    ("estimation/best_fit.py", "errors, flats[alike])", "errors, flats)"),
    ("estimation/estimate.py", "math.log(self._counts[1])", "math.log(self._counts[0])"),
    # Wrong values of the likelihood of counts.
    ("estimation/observed/likelihoods.py", "            + lgamma(observed + 1)\n",
     "            + lgamma(observed)\n"),
    # Errors of parameters by a likelihood in logarithms are wrong by a factor.
    ("estimation/observed/likelihoods.py",
     "1 / (noise * predicted) ** 2", "1 / noise**2 / predicted"),
    ("estimation/observed/likelihoods.py", "1 / (mean + mean**2 / k)", "1 / mean"),
    # The derivative of a noise that is zero where nothing was observed makes all NaN.
    ("estimation/populations/marginal.py", "missing = jnp.isnan(subject.ys)",
     "missing = jnp.zeros_like(subject.ys, bool)"),
    # Laplace's method without what the spread tells of the effects.
    ("estimation/populations/marginal.py",
     "jnp.full_like(mean, 2.0)])\n", "jnp.full_like(mean, 0.0)])\n"),
    # A dose after the last observation of a subject comes at once.
    ("estimation/observed/observed_system.py", "ts[..., -1:], jnp.inf, doses",
     "ts[..., -1:], 0.0, doses"),
    # Subjects that fill up a chunk of the population count twice.
    ("estimation/populations/maximum.py", "np.asarray(result.scores)[: len(subjects)]",
     "np.asarray(result.scores)"),
    # Likelihoods of subjects in another order than the subjects: messages name the wrong one.
    ("estimation/populations/maximum.py", "Total(np.concatenate(values)[order]",
     "Total(np.concatenate(values)"),
    # Steps of any length: a search from a noise that is far too small is lost.
    ("estimation/populations/maximum.py", "move * min(1.0, longest / length)", "move * 1.0"),
    # Nothing is undetermined: what observations do not determine gets an error.
    ("estimation/populations/maximum.py", "hidden > LIMITS.hidden_part *",
     "hidden > np.inf +"),
    # The noise goes to zero where few observations can be fitted exactly.
    ("estimation/search/objectives.py", "jnp.where(whole, flat, start)", "flat"),
    # The prior does not count for a density of the user's own.
    ("estimation/search/objectives.py",
     "cost = cost + 0.5 * jnp.sum(prior**2)\n        rows =", "rows ="),
    # Tolerances do not go with the unit of the data.
    ("estimation/observed/tolerances.py", "jnp.asarray(rtol * size", "jnp.asarray(rtol + 0 * size"),
    # A number of the state that begins at zero is solved as coarsely as the largest start says.
    ("estimation/observed/tolerances.py", "np.min(np.where(sizes > 0, sizes, np.inf), axis=0)",
     "np.max(sizes, axis=0)"),
    # A parameter of a population in a large unit is taken for one that nothing determines.
    ("estimation/populations/maximum.py",
     "np.diag(hessian), LIMITS.least_information / units**2)",
     "np.diag(hessian), LIMITS.least_information)"),
    # A deviation of zero is not told.
    ("estimation/populations/population.py", "zero = deviations <= ZERO_DEVIATION *",
     "zero = deviations < 0 *"),
    # Subjects are counted otherwise than by their deviation.
    ("estimation/populations/population.py",
     "@ directions.T, axis=0)", "@ directions.T, axis=0, ddof=1)"),
    # As many observations as parameters say a noise of zero.
    ("estimation/observed/observations.py", "if used <= count:", "if used < count:"),
    # Half a count is a count.
    ("estimation/observed/observations.py",
     "(values < 0) | (values != np.round(values))", "(values < 0)"),
    # The criterion by the number of parameters.
    ("estimation/populations/population.py",
     "math.log(self._observed)", "math.log(len(self.covariance))"),
    # A deviation that is not determined has an error.
    ("estimation/populations/population.py", "(slopes[:, unknown] != 0).any(axis=1)",
     "(slopes[:, unknown] != 0).all(axis=1) & False"),
    # Bands of one deviation in place of 95%.
    ("estimation/prediction.py", "NORMAL_95 = 1.959964", "NORMAL_95 = 1.0"),
    # What is not determined is predicted as if it were known.
    ("estimation/prediction.py", "undetermined.astype(int) > 0",
     "undetermined.astype(int) < 0"),
    # A new subject has the typical parameters.
    ("estimation/populations/new_subject.py", "effects = jnp.asarray(normal[:, :q]",
     "effects = jnp.asarray(0 * normal[:, :q]"),
    # The band of a new subject takes the parameters for known.
    ("estimation/populations/new_subject.py", "np.sqrt(np.maximum(variances, 0.0))",
     "np.sqrt(np.maximum(0 * variances, 0.0))"),
    # A profile of a population lets the parameter go.
    ("estimation/populations/population_profile.py",
     "likelihood.lower[place] = likelihood.upper[place] = value", "value"),
    # What an interrupt has cut short counts as a value of the profile.
    ("estimation/profiles.py", "inside &= fits.converged | (not budget.over)", "inside &= True"),
    # Programs that are traced within others count twice, so that a search has too much time.
    ("_jax/compile_time.py", "self.intervals[-1][0] >= begin", "self.intervals[-1][0] > end"),
    # Parts of the observations are solved to the end.
    ("estimation/observed/observed_system.py", "ts=jnp.minimum(self.ts, end)", "ts=self.ts"),
    # A prior does not get the data.
    ("estimation/observed/observed_system.py",
     "self.prior(self.with_args(params))", "self.prior(params)"),
    # A row that ends makes place for none before all end: the rest is never searched.
    ("estimation/search/levenberg_marquardt.py",
     "limit = 1 if over else steps + 1", "limit = steps + 1"),
    # The distance from the start counts in the result.
    ("estimation/search/levenberg_marquardt.py",
     "model = objective.local(flat, search.start, quantities, jacobian)\n",
     "model = _with_hold(objective.local(flat, search.start, quantities, jacobian), "
     "search.hold + 0 * flat, flat - search.start)\n"),
    # Slopes in another unit of time.
    ("estimation/search/slopes.py", "spline.derivative()(at) / unit", "spline.derivative()(at)"),
    # Slopes of what is missing count as if they were observed.
    ("estimation/search/slopes.py", "np.where(np.isnan(series), np.inf,",
     "np.where(np.isnan(series), 1.0,"),
    # A start whose end is that of another is lost.
    ("estimation/search/starts.py", "place[i] = same[0]", "place[i] = -1"),
    # Runs are kept however much they cost.
    ("estimation/search/starts.py", "else GIVE_UP_FACTOR * least", "else np.inf * least"),
    ("ode/odeint.py", "max_step = None if hmax == jnp.inf else hmax", "max_step = None"),
    # Wrong for a field that depends on time.
    ("ode/solvers/explicit.py", "h_bar + c[i] * dtime", "h_bar + dtime"),
    # The first stage of each step counts twice.
    ("ode/adjoints/sweep.py", "len(step.k) - 1, 1) if self.waits",
     "len(step.k) - 1, 0) if self.waits"),
    # An output at the start has no gradient.
    ("ode/adjoints/replay.py", " | (number == 1))", ")"),
    # The gradient of a failed row is finite.
    ("ode/adjoints/base.py", "masked = without_cotangent(bar, problem.t0) & useless",
     "masked = useless"),
    # A stage without a weight in the step has one in the gradient of the parameters.
    ("ode/adjoints/backsolve.py", "used = b[i] != 0", "used = b[i] == b[i]"),
    # The gradient through `evaluate` goes to the next step.
    ("ode/adjoints/discrete.py", "steps_bar[jnp.maximum(number - 1, 0)]", "steps_bar[number]"),
    # The backward pass starts one step too late.
    ("ode/loop/checkpoints.py", "jnp.where(self.step < stop, self.step",
     "jnp.where(self.step <= stop, self.step"),
    # Stages that were not kept are taken for kept ones.
    ("ode/loop/checkpoints.py", "slot < len(self.k) - 1", "slot < len(self.k)"),
    # A waiting row keeps the stages of a failed attempt.
    ("ode/loop/trajectory.py",
     "k = step.k if one_row(t) else jnp.where(accept[None, :, None], step.k, step.k[:1])",
     "k = step.k"),
    # A solve takes one step more than it has room for.
    ("ode/loop/acceptance.py", "attempts >= controller.max_steps",
     "attempts > controller.max_steps"),
    ("ode/loop/acceptance.py", "accept = ratio <= 1.0", "accept = ratio <= 10.0"),
    # The order of a stiff solver falls where the field depends on time.
    ("ode/solvers/rosenbrock.py", "at.solve(right + d[i] * h[:, None] * at.by_time)",
     "at.solve(right)"),
    # The gradient by the end of an empty span is zero.
    ("ode/loop/step_tangents.py", "ds = jnp.where((span == 0) & (number == 1), 1.0, h / safe)",
     "ds = h / safe"),
    ("divergence.py", "jnp.var(estimates, ddof=1)", "jnp.var(estimates, ddof=0)"),
    # A group that is one row short gets a base sample of the next group.
    ("coupling.py", "np.where(alike, 0.0, np.inf)", "np.where(alike, 0.0, 0.0)"),
    ("flows/bases.py", "0.5 * (n - 1) * dim", "0.5 * n * dim"),
    ("regularizers.py", "return jnp.sum(dz * dz)", "return jnp.mean(dz * dz)"),
    ("flows/diffusion.py", "asarray(z.size, z.dtype) + f", "asarray(1, z.dtype) + f"),
    ("images.py", "slope = math.log(1 - 2 * margin) - jnp.log(v)", "slope = -jnp.log(v)"),
    # The cell of 99 ends at 100, which is an atom: its part of the line has no number.
    ("tabular/columns/column.py", "other = np.isin(x, np.array(self.values, float))",
     "other = np.zeros(np.shape(x), bool)"),
    # Log-densities are those of standardized numbers.
    ("tabular/encoding.py", "log_scale -= np.log(column.scale)", "log_scale -= 0"),
    # An atom counts above its value, not at it.
    ("tabular/predictions/several_grids.py", "float) <= y[..., None]", "float) < y[..., None]"),
    # A number that falls short of a level is never its quantile.
    ("tabular/predictions/several_grids.py", "between & enough, middle", "enough, middle"),
    # The secant method turns its lines.
    ("tabular/predictions/several_grids.py", "slope = (z - self.z)", "slope = 0.0 * (z - self.z)"),
    # Quantiles at levels that are hardly apart cross.
    ("tabular/predictions/predictive.py", "return np.maximum.accumulate(y, axis=1)[", "return y["),
    # All rows aside count alike in a calibration.
    ("tabular/predictions/level_calibration.py",
     "if weights is None else _of_equal_weight(levels, weights)",
     "if weights is None else levels"),
    # A pooled category has the share of its rows, whatever they weigh.
    ("tabular/columns/modes_of_column.py", "share[level] += float(weight)", "share[level] += 1.0"),
    # A row that is impossible gets copies of the first proposal.
    ("tabular/impute.py", "np.where(impossible, 0.0, np.where(finite, weights, -np.inf))",
     "np.where(finite, weights, -1e30)"),
    # Draws beyond the training rows count as a part of those on a grid.
    ("tabular/columns/column.py", "self._warn_of_clipped(clipped, len(mode))",
     "self._warn_of_moved(moved, max(moved, 1))"),
    # Rows that training could not have count in the score.
    ("tabular/fit_table.py", "usable = np.flatnonzero(possible)",
     "known = np.arange(len(possible))"),
    # Levels are judged by the networks that were trained on their rows.
    ("tabular/fit_table.py", "cells = encoder.as_cells(split.aside)",
     "cells = encoder.as_cells(split.rows)"),
    # The numbers are trained as if all rows had one weight.
    ("tabular/fit_table.py", "InMemory(encoder.as_cells(split.rows), weights=split.weights)",
     "InMemory(encoder.as_cells(split.rows))"),
    # The network of an angle sees where it is cut.
    ("tabular/fit_table.py", "base = torus(size, period)", "base = standard_normal(size)"),
    # Categories are imputed by what comes before them alone.
    ("tabular/impute.py", "np.asarray(log_known, float)", "np.zeros(len(log_known))"),
    # A regressor forgets its weights.
    ("sklearn.py", "None if sample_weight is None else np.asarray(sample_weight)", "None"),
    # All random states are one.
    ("sklearn.py", "check_random_state(random_state)", "check_random_state(0)"),
    # Samples of an array are a frame.
    ("sklearn.py", 'return rows if hasattr(self, "feature_names_in_") else rows.to_numpy()',
     "return rows"),
    # A training of some seconds is a function of its random state.
    ("sklearn.py", "self.seconds is not None or self.steps is None", "False"),
    # A density is drawn with its axes exchanged.
    ("plot.py", ".reshape(points, points)", ".reshape(points, points).T"),
    # A pullback that is mapped twice exchanges its axes for ever.
    ("ode/adjoints/vmap.py",
     "if not any(jax.tree.leaves((by_outer[0], by_outer[2:]))):", "if False:"),
    # Files of 0.6 are refused, whose bounds have other names.
    ("saving/reader.py", "str(renamed.get(field, field))", "str(field)"),
    # A later version's file is read as one of this version, and a text as a part of a file.
    ("saving/container.py", "    if version > VERSION:", "    if False:"),
    ("saving/container.py", '    if not start.startswith(b"PK"):', "    if False:"),
    # Another template's arrays are taken, and weak types become strong.
    ("saving/reader.py",
     "    if (np.shape(value), value.dtype) != (tuple(leaf.shape), leaf.dtype):", "    if False:"),
    ("saving/reader.py", "weakly_typed(jnp.asarray(values)) if weak else jnp.asarray(values)",
     "jnp.asarray(values)"),
    # Infinity is no JSON, and leaves that JAX takes for static come back as others.
    ("saving/writer.py", 'return x if math.isfinite(x) else {"number": repr(x)}', "return x"),
    ("saving/writer.py", 'node["constants"].append(at)', "pass"),
    # A file names any function of Optax.
    ("saving/registry.py", "return cls if _is_state_or_solver(cls) else None", "return cls"),
    # Categories lose their order, and times their zone.
    ("saving/frame_types.py", 'CategoricalDtype(categories, kind["ordered"])',
     "CategoricalDtype(categories, False)"),
    ("saving/frame_types.py", "pandas.Timestamp(value, tz=zone)", "pandas.Timestamp(value)"),
    # A model like that in the file is taken for what is missing in it.
    ("saving/models.py", "    if type(like) is kind:", "    if False:"),
)  # fmt: skip
