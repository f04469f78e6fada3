"""The faults that `mutations.py` plants: a file of jaxode, a text that it has once, a wrong one.

A user could suffer from each: a wrong number, gradient, mask or message, or an error that is not
raised. Each folder with logic has at least four.
"""

# Where to look, first by the longest of these that a file of jaxode starts with.
FIRST = {
    "": ("tests",),
    "_checks": ("tests/test_inputs.py", "tests/test_not_finite.py"),
    "_checks/errors": ("tests/ode/test_failures.py", "tests/flows/test_bad_data.py"),
    "_checks/samples": (
        "tests/flows/test_cnf.py",
        "tests/flows/test_bad_data.py",
        "tests/test_inputs.py",
    ),
    "_jax": ("tests/_jax",),
    "_jax/tangents": (
        "tests/ode/test_jumps.py",
        "tests/ode/test_steady.py",
        "tests/ode/test_events.py",
    ),
    "_jax/vmap_rule": ("tests/test_transforms.py", "tests/ode/test_vmap.py"),
    "auditing": ("tests/auditing",),
    "calibration": ("tests/calibration",),
    "flows/coupling": ("tests/flows/test_coupling.py",),
    "density": ("tests/density",),
    "density/contexts": ("tests/density/test_context.py", "tests/density/test_embed.py"),
    "density/density": ("tests/density/test_density.py", "tests/density/test_support.py"),
    "density/maps": ("tests/density/test_standardize.py",),
    "density/maps/columns": ("tests/flows/test_torus.py", "tests/tabular/test_periodic.py"),
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
    "flows/diffusion": ("tests/flows/test_probability_flow.py",),
    "flows/bases": ("tests/flows/test_distributions.py", "tests/flows/test_nn.py"),
    "flows/divergence": ("tests/flows/test_divergence.py",),
    "flows": ("tests/flows/test_flow_features.py", "tests/flows"),
    "flows/matching": ("tests/flows/test_matching.py", "tests/flows/test_torus.py"),
    "flows/periods": ("tests/flows/test_torus.py",),
    "flows/embedding": ("tests/density/test_embed.py",),
    "flows/chunks": ("tests/flows/test_chunks.py",),
    "flows/centered": ("tests/flows/test_distributions.py",),
    "flows/likelihood": ("tests/flows/test_flow_features.py", "tests/flows/test_bad_data.py"),
    "images": ("tests/test_images.py",),
    "interop": ("tests/interop/test_interop.py",),
    "nn": ("tests/flows/test_nn.py",),
    "nn/deep_set": ("tests/density/test_embed.py",),
    "ode": ("tests/ode",),
    "ode/adjoints": ("tests/ode/test_adjoints.py", "tests/ode/test_discrete.py"),
    "ode/adjoints/backsolve": ("tests/ode/test_backsolve.py",),
    "ode/adjoints/base": ("tests/ode/test_failed_gradients.py",),
    "ode/adjoints/discrete": ("tests/ode/test_dense.py",),
    "ode/dense": ("tests/ode/test_dense.py",),
    "ode/events": ("tests/ode/test_events.py",),
    "ode/pieces": ("tests/ode/test_jumps.py", "tests/ode/test_breakpoints.py"),
    "ode/loop/crossing": ("tests/ode/test_events.py",),
    "ode/loop/integrate": ("tests/ode/test_events.py",),
    "ode/loop/outputs": ("tests/ode/test_events.py", "tests/ode/test_solve.py"),
    "ode/loop/problem": ("tests/ode/test_breakpoints.py",),
    "ode/loop/trajectory": ("tests/ode/test_rows.py", "tests/ode/test_adjoints.py"),
    "ode/loop/step_tangents": ("tests/ode/test_discrete.py", "tests/ode/test_adjoints.py"),
    "ode/loop/checkpoints": ("tests/ode/test_discrete.py",),
    "ode/loop/progress": ("tests/ode/test_failures.py",),
    "ode/solvers/explicit": ("tests/ode/test_tolerances.py", "tests/test_theory.py"),
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
    "estimation/marginal": ("tests/estimation/test_population.py",),
    "estimation/objectives": ("tests/estimation/test_likelihoods.py",),
    "estimation/search": ("tests/estimation/test_search.py", "tests/estimation/test_estimate.py"),
    "ode/system": ("tests/ode/test_rows.py",),
    "plot": ("tests/test_plot.py",),
    "tabular": ("tests/tabular",),
    "tabular/encoding": ("tests/tabular/test_columns.py", "tests/tabular/test_table.py"),
    "tabular/impute": ("tests/tabular/test_table.py",),
    "tabular/columns": ("tests/tabular/test_columns.py",),
    "tabular/several_grids": ("tests/tabular/test_predictions.py",),
    "tabular/predictions": ("tests/tabular/test_predictions.py",),
    "flows/regularizers": ("tests/flows/test_flow_features.py",),
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
    # Wrong under `jax.vmap` with `in_axes=1`.
    ("_jax/vmap_rule.py", "else jax.numpy.moveaxis(x, axis, 0)", "else x"),
    # The reference of all errors is as loose as what it judges.
    ("auditing/audited_flow.py", "tolerance = 1e-10 if", "tolerance = 1e-2 if"),
    # A sample of density zero stands in for the others.
    ("auditing/audited_flow.py", "jnp.argmin(self.outside)", "jnp.argmax(self.outside)"),
    # Samples that do not fit their density pass.
    ("auditing/base.py", "IMBALANCE = 6.0", "IMBALANCE = 600.0"),
    # A right divergence with probes is condemned for its noise.
    ("auditing/divergence.py", "- 5 * noise, 0.0)", "+ 5 * noise, 0.0)"),
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
    # A network sees a context once for each sample.
    ("density/contexts.py", "or context is None or self.shapes is None:", "or True:"),
    # The gradient of a set with gaps is NaN.
    ("nn/deep_set.py", "x = jnp.where(there[:, None], points, 0.0)", "x = points"),
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
    ("training/dataset.py", "_source_of(_chosen(rows, own), devices",
     "_source_of(_chosen(rows, shuffled), devices"),
    # All members of an ensemble take the same batches.
    ("training/trials.py", "phase._replace(key=key)", "phase"),
    # All steps of a block see the same rows.
    ("training/loop.py", "jax.random.fold_in(key, i)", "jax.random.fold_in(key, 0)"),
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
    ("flows/centered.py", "div - jnp.trace(moved(jnp.zeros_like(z[0])))", "div"),
    # Running costs are negative.
    ("flows/likelihood/quadrature.py", "[jnp.abs(weight)] * (costs - 1)", "[weight] * (costs - 1)"),
    # A row of weight zero that ends where the base has no density makes the loss NaN.
    ("flows/likelihood/objective.py",
     "jnp.where(unused | ((weights == 0) & ~jnp.isfinite(losses)), 0, losses)",
     "jnp.where(unused, 0, losses)"),
    # The gradient by the times forgets the sizes of the steps.
    ("flows/likelihood/objective.py", "swept.t0 + by_times[0], swept.t1 + by_times[1]",
     "swept.t0, swept.t1"),
    # Rows that fail are left out of the loss in silence.
    ("flows/likelihood/objective.py", "failed & (weights == 0) if result.shape",
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
    ("nn/particles.py", "return apart + own + ", "return apart - own + "),
    # Transposed samples pass.
    ("nn/network.py", "return shape in (self._shape, (size,))", "return math.prod(shape) == size"),
    # Samples far from the data overflow.
    ("nn/residual.py", "LARGEST_ACTIVATION * jnp.tanh(h / LARGEST_ACTIVATION)", "h"),
    # Wrong backwards in time, and so is the next one.
    ("ode/dense.py", "sign[None] * ends, last)", "ends, last)"),
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
    ("ode/loop/problem.py", "jnp.where(t < first, first,", "jnp.where(t < first, t,"),
    # The next piece begins with the first step of a new solve.
    ("ode/pieces.py", "jnp.where(cut.counted & (h != 0), h, carry.h)", "jnp.nan * h"),
    # Padding of jumps counts.
    ("ode/pieces.py", "~jnp.isposinf(times) & ~repeats", "~jnp.isposinf(times)"),
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
    ("density/maps/columns.py", "return not set(columns) & set(self.columns)", "return True"),
    # The last cell of a circle reaches into the first.
    ("tabular/columns.py", "end = np.minimum(end, self.circle.end)", "pass"),
    # An interpolation may end before the solve.
    ("ode/interpolations.py", "(low < first - near) | (high > last + near)", "low < first - near"),
    # What a profile holds moves.
    ("estimation/profiles.py", "np.where(self.chosen, starts, bound)", "bound + 0 * starts"),
    # The distance to a value is not made up for.
    ("estimation/profiles.py", "aims = aims - np.nan_to_num(apart)", "aims = aims"),
    # The gradient is as if the effects of a subject stayed.
    ("estimation/marginal.py", "by[:count] + down @ moves", "by[:count]"),
    # A start that was replaced counts where it was.
    ("estimation/search.py", "of_all[of_row[ended]] =", "of_all[ended] ="),
    ("estimation/search.py", "near = ~row.cut & (", "near = ("),
    ("estimation/starts.py", "if whole and not with_starts:", "if False:"),
    # Errors of others are as if a parameter at its bound were free.
    ("estimation/uncertainty.py", "np.where(free, np.nan_to_num(jacobian), 0.0)",
     "np.nan_to_num(jacobian)"),
    # The score of the noise is as if the residuals were one.
    ("estimation/objectives.py", "append(down_noise /", "append(0 * down_noise /"),
    # Observations that are missing count.
    ("estimation/problem.py", "return seen & ~jnp.isnan(self.ys)", "return seen & True"),
    # No part of the observations comes first.
    ("estimation/starts.py", "PARTS_OF_TIMES[min(number, len(PARTS_OF_TIMES) - 1)] * len(times)",
     "len(times)"),
    ("estimation/uncertainty.py", "covariance = scale * inverse", "covariance = inverse"),
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
    ("ode/loop/progress.py", "attempts >= controller.max_steps", "attempts > controller.max_steps"),
    ("ode/loop/step_size.py", "accept = ratio <= 1.0", "accept = ratio <= 10.0"),
    # The order of a stiff solver falls where the field depends on time.
    ("ode/solvers/rosenbrock.py", "at.solve(right + d[i] * h[:, None] * at.by_time)",
     "at.solve(right)"),
    # The gradient by the end of an empty span is zero.
    ("ode/loop/step_tangents.py", "ds = jnp.where((span == 0) & (number == 1), 1.0, h / safe)",
     "ds = h / safe"),
    ("flows/divergence.py", "jnp.var(estimates, ddof=1)", "jnp.var(estimates, ddof=0)"),
    # A group that is one row short gets a base sample of the next group.
    ("flows/coupling.py", "np.where(alike, 0.0, np.inf)", "np.where(alike, 0.0, 0.0)"),
    ("flows/bases.py", "0.5 * (n - 1) * dim", "0.5 * n * dim"),
    ("flows/regularizers.py", "return jnp.sum(dz * dz)", "return jnp.mean(dz * dz)"),
    ("flows/diffusion.py", "asarray(z.size, z.dtype) + f", "asarray(1, z.dtype) + f"),
    ("images.py", "slope = math.log(1 - 2 * margin) - jnp.log(v)", "slope = -jnp.log(v)"),
    # The cell of 99 ends at 100, which is an atom: its part of the line has no number.
    ("tabular/columns.py", "other = np.isin(x, np.array(self.values, float))",
     "other = np.zeros(np.shape(x), bool)"),
    # Log-densities are those of standardized numbers.
    ("tabular/encoding.py", "log_scale -= np.log(column.scale)", "log_scale -= 0"),
    # An atom counts above its value, not at it.
    ("tabular/several_grids.py", "float) <= y[..., None]", "float) < y[..., None]"),
    # A number that falls short of a level is never its quantile.
    ("tabular/several_grids.py", "between & enough, middle", "enough, middle"),
    # The secant method turns its lines.
    ("tabular/several_grids.py", "slope = (z - self.z)", "slope = 0.0 * (z - self.z)"),
    # Categories are imputed by what comes before them alone.
    ("tabular/impute.py", "np.asarray(log_known, float)", "np.zeros(len(log_known))"),
    # A density is drawn with its axes exchanged.
    ("plot.py", ".reshape(points, points)", ".reshape(points, points).T"),
)  # fmt: skip
