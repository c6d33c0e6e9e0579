"""Break the code on purpose, one named error at a time; a test must fail.

Run `make mutants` or `python -m tests.mutants`. Each mutant is applied to a copy of the project, in
which the named tests run. A mutant that survives is a gap in the tests. docs/mutants.md lists all.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PARTS = (
    "bilevel",
    "problems",
    "solvers",
    "tests",
    "conf",
    "docs",
    "benchmarks",
    "pyproject.toml",
    "mkdocs.yml",
    "README.md",
)


class Mutant(NamedTuple):
    """Replace `old` by `new` in `file`; one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(
        "a GPU gathers a class that has no score",
        "bilevel/checks/calls.py",
        'raise IndexError("index out of bounds")',
        "pass",
        "bilevel/checks/test_splits.py",
    ),
    Mutant(
        "an error is named for each split, where only their lengths differ",
        "bilevel/checks/splits.py",
        "int(a) * second == int(b) * first",
        "int(a) == int(b)",
        "bilevel/checks/test_report.py",
    ),
    Mutant(
        "a write in place that leaves the values alone passes the check",
        "bilevel/checks/prediction_laws.py",
        "if writes[part] != _writes(tree) or not bitwise_equal(tree, before[part])",
        "if not bitwise_equal(tree, before[part])",
        "bilevel/checks/test_report.py",
    ),
    Mutant(
        "an error of our own loss names neither split nor field",
        "bilevel/checks/trial.py",
        "if calls.failed is not None:  # our own loss",
        "if False:  # our own loss",
        "bilevel/checks/test_report.py",
    ),
    Mutant(
        "a product takes the parts of an earlier vector",
        "solvers/autodiff/pullback.py",
        "if self._split is None or self._split[0] is not q:",
        "if self._split is None:",
        "solvers/test_implicit.py",
    ),
    Mutant(
        "the last values of a run leave its optimizer as it is",
        "solvers/base/core.py",
        "        initial |= constants or {}\n",
        "",
        "solvers/test_hyper_schedules.py",
    ),
    Mutant(
        "an optimizer that wraps another one is taken",
        "bilevel/tuner/own_optimizer.py",
        'if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):',
        "if False:",
        "bilevel/tuner/test_trainers.py",
    ),
    Mutant(
        "a refusal is the error of PyTorch as it is",
        "bilevel/checks/hints.py",
        "{type(error).__name__}: {without_hint(error)})",
        "{error})",
        "bilevel/checks/test_report.py",
    ),
    Mutant(
        "a resumed run keeps the environment of its first session",
        "bilevel/loggers/jsonl.py",
        "            _renew_environment(run)\n",
        "",
        "bilevel/run/test_environment.py",
    ),
    Mutant(
        "the threads of a run are those before its training",
        "bilevel/run/stages.py",
        '    run.checkpoints.environment |= {"threads": threads}\n',
        "",
        "bilevel/run/test_environment.py",
    ),
    Mutant(
        "a packed branch has no commit",
        "bilevel/run/environment.py",
        'line.split(" ")[0] for line in packed if',
        'line.split(" ")[0] for line in packed[:0] if',
        "bilevel/run/test_environment.py",
    ),
    Mutant(
        "a hyperparameter called threads counts as the threads of a run",
        "bilevel/comparison/provenance.py",
        "for part in (own, record, *record.values()):",
        "for part in (record, *record.values()):",
        "bilevel/comparison/test_tables.py",
    ),
    Mutant(
        "arrays of float64 stay so for a network of float32",
        "bilevel/data/in_memory.py",
        "np.float32 if single else np.float64",
        "np.float64",
        "bilevel/data/test_in_memory.py",
    ),
    Mutant(
        "a data set that makes its examples itself is read as its tensors",
        "bilevel/data/in_memory.py",
        "isinstance(data, TensorDataset) and type(data).__getitem__ is TensorDataset.__getitem__",
        "isinstance(data, TensorDataset)",
        "bilevel/data/test_in_memory.py",
    ),
    Mutant(
        "an array with a mask loses it",
        "bilevel/data/in_memory.py",
        "    if isinstance(array, np.ma.MaskedArray):",
        "    if False:",
        "bilevel/data/test_in_memory.py",
    ),
    Mutant(
        "summary.json is written before W&B has ended",
        "bilevel/loggers/wandb_logger.py",
        "        self.close()  # a run whose",
        "        # a run whose",
        "bilevel/loggers/test_wandb.py",
    ),
    Mutant(
        "large hyperparameters that differ are stored as one",
        "bilevel/checkpoint/large_values.py",
        "return one.dtype == other.dtype and torch.equal(one, other)",
        "return one.dtype == other.dtype and one.shape == other.shape",
        "bilevel/checkpoint/test_large_values.py",
    ),
    Mutant(
        "the lock file of a living run is replaced",
        "bilevel/run/lock_file.py",
        "not _is_dead(found) and age < STALE",
        "not _is_dead(found) and age < -STALE",
        "bilevel/run/test_directory_lock.py",
    ),
    Mutant(
        "a run whose directory was moved saves at the old path",
        "bilevel/run/stages.py",
        "run.checkpoints.directory = run.lock.place(run.directory)",
        "run.lock.place(run.directory)",
        "bilevel/run/test_directory_lock.py",
    ),
    Mutant(
        "the trainings of a check go on from each other",
        "bilevel/run/hypergradient_check.py",
        "        self._take_over(solver, data)\n        self.twin.displace(offset)\n",
        "        self.twin.inner_count = solver.inner_count\n        self.twin.displace(offset)\n",
        "bilevel/run/test_hypergradient_check.py",
    ),
    Mutant(
        "a round goes on beyond the end of the tuning",
        "bilevel/run/budget.py",
        "ends = (self.plain_steps, self.warmup_steps, self.tuned_steps, self.steps)",
        "ends = (self.plain_steps, self.warmup_steps, self.steps)",
        "bilevel/run/test_tune_fraction.py",
    ),
    Mutant(
        "a resumed run may move the end of its tuning",
        "bilevel/run/tune_fraction.py",
        "if ends[0] != ends[1] and reached:",
        "if ends[0] != ends[1] and not reached:",
        "bilevel/run/test_tune_fraction.py",
    ),
    Mutant(
        "a refit trains at the initial λ",
        "bilevel/run/refit.py",
        'if name == "start":',
        'if name != "best":',
        "bilevel/run/test_refit.py",
    ),
    Mutant(
        "a refit of another λ is continued",
        "bilevel/run/refit.py",
        "same = bool(kept(directory)) and load_config(directory) == config",
        "same = bool(kept(directory))",
        "bilevel/run/test_refit.py",
    ),
    Mutant(
        "a diverged refit can be the result",
        "bilevel/run/refit.py",
        'if not result["diverged"] and select.improves',
        "if select.improves",
        "bilevel/run/test_refit.py",
    ),
    Mutant(
        "the summary leaves out the cost of the refits",
        "bilevel/run/refit.py",
        "sum(result[name] for result in found.values()) for name in TOTALS}",
        "found[OWN][name] for name in TOTALS}",
        "bilevel/run/test_refit.py",
    ),
    Mutant(
        "the chosen weights are those of the run, whatever the summary chooses",
        "bilevel/checkpoint/refit_directory.py",
        "return run / refit_directory(chosen) if chosen in NAMES else run",
        "return run",
        "bilevel/run/test_refit.py",
    ),
    Mutant(
        "W&B's file is taken for whole although records are missing",
        "bilevel/loggers/wandb_file.py",
        "if not lost and found.ended:",
        "if found.ended or lost:",
        "bilevel/cli/test_log.py",
    ),
    Mutant(
        "transposed response: the scale on the inputs of a layer, not on its outputs",
        "solvers/response/rules.py",
        "        if weight.axis == 0:\n            units",
        "        square = weight.base.shape[0] == weight.base.shape[1]\n"
        "        if weight.axis == 1 or not square:\n            units",
        "solvers/response/test_rules.py",
    ),
    Mutant(
        "the rows of an example taken to be apart in a folded axis",
        "solvers/response/per_example_weight.py",
        "return t.unflatten(0, (-1, k)) if",
        "return t.unflatten(0, (k, -1)).transpose(0, 1) if",
        "solvers/response/test_rules.py",
    ),
    Mutant(
        "a step accepts another number of rows for each example than set-up",
        "solvers/response/row_counts.py",
        "fits = rows == known * examples or",
        "fits = rows % examples == 0 or",
        "solvers/base/test_row_check.py",
    ),
    Mutant(
        "a second size of the batch leaves a table of positions taken for folded tokens",
        "solvers/response/row_counts.py",
        "if rows > 1 and constant:",
        "if rows > 1 and constant and k is None:",
        "solvers/base/test_row_check.py",
    ),
    Mutant(
        "a fold whose rows mix the examples is left out of the check",
        "solvers/base/row_check.py",
        "strict = core.calls.differentiates or counts.folds()",
        "strict = core.calls.differentiates",
        "solvers/base/test_row_check.py",
    ),
    Mutant(
        "the check stays at w₀, where a gate of 0 hides a branch",
        "solvers/base/row_check.py",
        "w0 = response.weights(theta, w0, 0.1 * offset[0], tangent=False)",
        "w0 = response.weights(theta, w0, 0.0 * offset[0], tangent=False)",
        "solvers/base/test_row_check.py",
    ),
    Mutant(
        "every example of a round of the check gets the same offset",
        "solvers/base/row_check.py",
        "dealt = number % len(values)",
        "dealt = 0 * number",
        "solvers/base/test_row_check.py",
    ),
    Mutant(
        "the initial response of a layer is smaller than its weight by a factor of √3",
        "solvers/response/jacobian.py",
        "norm * math.sqrt(3 / weight.numel())",
        "norm / math.sqrt(weight.numel())",
        "solvers/response/test_jacobian.py",
    ),
    Mutant(
        "the learning rates of λ and σ stay constant when that of w falls",
        "solvers/base/descent.py",
        "            self.core.outer_rates.follow()\n",
        "            pass\n",
        "solvers/optim/test_followed_schedule.py",
    ),
    Mutant(
        "the factor of a schedule is taken from its own last step",
        "solvers/optim/followed_schedule.py",
        'group["lr"] = rate * factor',
        'group["lr"] = lr * factor',
        "solvers/optim/test_followed_schedule.py",
    ),
    Mutant(
        "a cheaper response is trained at every step",
        "solvers/response/cheaper_pass.py",
        "return (count - 1) % self.every == 0",
        "return True",
        "solvers/response/test_cheaper_pass.py",
    ),
    Mutant(
        "the response of a part of the batch continues from its own old carry",
        "solvers/self_tuning.py",
        "start = cheaper.carry(core.problem, before, batch, part)",
        "start = cheaper.carry(core.problem, self.response_carry, batch, part)",
        "solvers/response/test_cheaper_pass.py",
    ),
    Mutant(
        "steps without a response pass count in the mean of its loss",
        "solvers/base/core.py",
        "return {name: total / counts[name] for",
        "return {name: total / max(counts.values()) for",
        "solvers/response/test_cheaper_pass.py",
    ),
    Mutant(
        "the noise of a running mean is taken for that of one gradient",
        "solvers/optim/signal.py",
        "mean_square / (s / (1 - s) * spread)",
        "mean_square / (1 / (1 - s) * spread)",
        "solvers/optim/test_outer_rmsprop.py",
    ),
    Mutant(
        "the shared scale is the mean size, not the largest",
        "solvers/optim/outer_rmsprop.py",
        "torch.stack([v.max() for v in squares]).max()",
        "torch.stack([v.mean() for v in squares]).mean()",
        "solvers/optim/test_outer_rmsprop.py",
    ),
    Mutant(
        "σ passes its largest value",
        "solvers/base/method.py",
        "        self.core.search.cap_scale()\n",
        "",
        "solvers/base/test_search_distribution.py",
    ),
    Mutant(
        "coordinates without a gradient count in the ratio of signal to noise",
        "solvers/base/hypergradient_signal.py",
        "counts = square > 0",
        "counts = square >= 0",
        "solvers/base/test_hypergradient_signal.py",
    ),
    Mutant(
        "a frozen round trains the response too",
        "solvers/base/descent.py",
        "            if self.method.plain_warmup:\n",
        "            if True:\n",
        "solvers/test_frozen.py",
    ),
    Mutant(
        "a frozen STN trains w₀ beside a response that stays",
        "solvers/self_tuning.py",
        "                self.response.clear(self.theta.tensors)\n",
        "                pass\n",
        "solvers/test_frozen.py",
    ),
    Mutant(
        "σ² for σ in the perturbation of training",
        "solvers/base/search_distribution.py",
        "return self.sigma.detach() * self.noise",
        "return self.sigma.detach() ** 2 * self.noise",
        "solvers/base/test_search_distribution.py",
    ),
    Mutant(
        "σ² for σ in the outer phase",
        "solvers/base/search_distribution.py",
        "else moved + self.sigma * self.noise",
        "else moved + self.sigma**2 * self.noise",
        "solvers/base/test_search_distribution.py",
    ),
    Mutant(
        "s for σ: the softplus forgotten",
        "solvers/base/search_distribution.py",
        "return F.softplus(self.s)",
        "return self.s",
        "solvers/base/test_search_distribution.py",
    ),
    Mutant(
        "entropy subtracted twice: its sign turned",
        "solvers/base/method.py",
        "objective - weight * value",
        "objective + weight * value",
        "solvers/test_theory_nonlinear.py",
    ),
    Mutant(
        "entropy of a variance: log σ² for log σ",
        "solvers/base/search_distribution.py",
        "torch.log(self.sigma).sum()",
        "torch.log(self.sigma**2).sum()",
        "solvers/base/test_search_distribution.py",
    ),
    Mutant(
        "the response of training taken at u, not at ε, though centered",
        "solvers/self_tuning.py",
        "offset = noise if flags.centered else perturbed",
        "offset = perturbed",
        "solvers/test_theory.py solvers/test_self_tuning.py",
    ),
    Mutant(
        "the response of the outer phase taken at u, not at ε, though centered",
        "solvers/self_tuning.py",
        "at = offset if self.settings.centered else self.core.search.u0 + offset",
        "at = self.core.search.u0 + offset",
        "solvers/test_theory.py solvers/test_self_tuning.py",
    ),
    Mutant(
        "a norm in forward mode takes an input with a graph",
        "solvers/autodiff/norm_tangents.py",
        "    if value.requires_grad:",
        "    if False:",
        "solvers/autodiff/test_norm_tangents.py",
    ),
    Mutant(
        "batch norm in forward mode dispatches on its statistics",
        "solvers/autodiff/norm_tangents.py",
        "    if not training:",
        "    if running_mean is not None:",
        "solvers/autodiff/test_norm_tangents.py",
    ),
    Mutant(
        "batch-norm statistics of the perturbed pass kept",
        "solvers/self_tuning.py",
        "self.response_carry = end",
        "core.carry = self.response_carry = end",
        "solvers/test_solver_state.py",
    ),
    Mutant(
        "batch-norm statistics written twice per batch",
        "solvers/self_tuning.py",
        "self.perturbed_loss(w0, start, part)",
        "self.perturbed_loss(w0, core.carry, part)",
        "solvers/test_solver_state.py",
    ),
    Mutant(
        "the tangent goes through W₁ too",
        "solvers/response/rules.py",
        "units = f(primal(x) if weight.tangent else x, weight.response, None)",
        "units = f(primal(x), weight.response, None) + "
        "(0 if tangent(x) is None else f(tangent(x), weight.response, None))",
        "solvers/response/test_rules.py",
    ),
    Mutant(
        "W₁ẋ computed and thrown away",
        "solvers/response/rules.py",
        "            units = f(primal(x) if weight.tangent else x, weight.response, None)",
        "            units = f(x, weight.response, None)\n"
        "            units = primal(units) if weight.tangent else units",
        "solvers/test_step_cost.py",
    ),
    Mutant(
        "a stale u₀: the centre never moves",
        "solvers/base/search_distribution.py",
        "        self.u0.copy_(self.u.detach())\n",
        "        pass\n",
        "solvers/test_self_tuning.py",
    ),
    Mutant(
        "u₀ moves in the middle of an outer phase",
        "solvers/base/descent.py",
        "        return metrics | self.end_outer()",
        "            metrics = metrics | self.end_outer()\n        return metrics",
        "solvers/test_self_tuning.py",
    ),
    Mutant(
        "w₀ moves with the perturbed loss, though regularized",
        "solvers/self_tuning.py",
        "            w0, part, start = core.weights.detached(), batch, self.response_carry\n"
        "            if not cheaper.whole:\n"
        "                part = cheaper.part(batch)\n"
        "                start = cheaper.carry(core.problem, before, batch, part)\n"
        "            response_loss, end = self.perturbed_loss(w0, start, part)\n"
        "            descend(response_loss, self.theta)",
        "            w0, part, start = core.weights.tensors, batch, self.response_carry\n"
        "            if not cheaper.whole:\n"
        "                part = cheaper.part(batch)\n"
        "                start = cheaper.carry(core.problem, before, batch, part)\n"
        "            response_loss, end = self.perturbed_loss(w0, start, part)\n"
        "            descend(response_loss, self.theta, core.weights)",
        "solvers/test_self_tuning.py",
    ),
    Mutant(
        "Θ's step sees w₀ as it was before its own step",
        "solvers/self_tuning.py",
        "        loss = self.descend_weights(batch)\n"
        '        with core.services.phase("response"):\n'
        "            w0, part, start = core.weights.detached(), batch",
        "        w0 = {name: w.clone() for name, w in core.weights.detached().items()}\n"
        "        loss = self.descend_weights(batch)\n"
        '        with core.services.phase("response"):\n'
        "            part, start = batch",
        "solvers/test_self_tuning.py",
    ),
    Mutant(
        "the penalty at w₀, not at w₀ + ΔW(ε), under linearization",
        "solvers/self_tuning.py",
        "        loss = core.problem.inner_objective(hypers, params, prediction, batch)\n"
        "        return self.decayed",
        "        params = w0 if flags.linearize else params\n"
        "        loss = core.problem.inner_objective(hypers, params, prediction, batch)\n"
        "        return self.decayed",
        "solvers/autodiff/test_linearization.py",
    ),
    Mutant(
        "y₀ forgotten: the objective at ẏ alone",
        "solvers/autodiff/linearization.py",
        "return value if dot is None else value + dot",
        "return value if dot is None else dot",
        "solvers/autodiff/test_linearization.py solvers/test_theory_nonlinear.py",
    ),
    Mutant(
        "the cross term of ‖W₀ + diag(s)W₁‖² counted once",
        "solvers/response/rules.py",
        "2 * cross",
        "1 * cross",
        "solvers/response/test_rules.py",
    ),
    Mutant(
        "per-batch hyperparameters perturbed per example",
        "solvers/base/search_distribution.py",
        "torch.where(self._per_example, n, n[:1])",
        "n",
        "solvers/base/test_search_distribution.py",
    ),
    Mutant(
        "integers rounded down, not stochastically",
        "bilevel/domains.py",
        "return torch.floor(value + draw).clamp(",
        "return torch.floor(value).clamp(",
        "bilevel/test_space.py solvers/base/test_search_distribution.py",
    ),
    Mutant(
        "the warm-up moves λ",
        "solvers/base/descent.py",
        "return metrics if warmup else metrics | self.outer_phase()",
        "return metrics | self.outer_phase()",
        "solvers/test_self_tuning.py",
    ),
    Mutant(
        "the mask of dropout not rescaled",
        "bilevel/dropout/kinds.py",
        "< keep) / keep",
        "< keep)",
        "problems/test_problems.py",
    ),
    Mutant(
        "the best checkpoint is the worst",
        "bilevel/selection.py",
        "self.score(record) < self.score(best)",
        "self.score(record) > self.score(best)",
        "bilevel/run/test_runner.py",
    ),
    Mutant(
        "a resumed stream starts its epoch again",
        "bilevel/data/tensor_stream.py",
        'self.examples, self._position = state["examples"], state["position"]\n        self._order',
        'self.examples, self._position = state["examples"], 0\n        self._order',
        "bilevel/data/test_streams.py",
    ),
    Mutant(
        "a differentiable Adam that loses its square root",
        "solvers/optim/updates.py",
        '    scale = -s["lr"] / (1 - s["beta1"] ** count)\n    root = square_root(square)',
        '    scale = -s["lr"] / (1 - s["beta1"] ** count)\n    root = square',
        "solvers/optim/test_functional.py",
    ),
    Mutant(
        "the scale of CG's step dropped",
        "solvers/linear_solve/conjugate_gradients.py",
        "step = torch.where(active, rr / curvature, zero)",
        "step = torch.where(active, 1 / curvature, zero)",
        "solvers/linear_solve/test_conjugate_gradients.py",
    ),
    Mutant(
        "CG's residual not updated",
        "solvers/linear_solve/conjugate_gradients.py",
        "            r.addcmul_(image, step, value=-1)\n",
        "            r.addcmul_(image, step, value=-0.0)\n",
        "solvers/linear_solve/test_conjugate_gradients.py",
    ),
    Mutant(
        "the step of Neumann and fixed point not capped",
        "solvers/linear_solve/neumann.py",
        "return largest, torch.minimum(*bounds).clamp(min=0)",
        "return largest, bounds[0]",
        "solvers/linear_solve/test_neumann.py",
    ),
    Mutant(
        "the sign of the implicit term turned",
        "solvers/implicit.py",
        "return -ctx.method.adjoint(u",
        "return ctx.method.adjoint(u",
        "solvers/test_hypergradients.py",
    ),
    Mutant(
        "a finite difference under two masks",
        "solvers/sama.py",
        "        generator.set_state(masks)\n        behind",
        "        behind",
        "solvers/test_sama.py",
    ),
    Mutant(
        "ξ divided by σ, not by σ²",
        "solvers/evolution.py",
        "(2 * count * self.sigma**2)",
        "(2 * count * self.sigma)",
        "solvers/test_evolution.py",
    ),
    Mutant(
        "the last trial is the solution, not the best",
        "solvers/black_box/search.py",
        '(self.best is None or score < self.best["score"])',
        "(self.best is None or score < math.inf)",
        "solvers/black_box/test_search.py",
    ),
    Mutant(
        "members of a population share their weights",
        "solvers/black_box/member.py",
        "    return {name: t.detach().clone() for name, t in tensors.items()}",
        "    return {name: t.detach() for name, t in tensors.items()}",
        "solvers/black_box/test_population.py",
    ),
    Mutant(
        "Gaussian dropout with the rate for its variance",
        "bilevel/dropout/kinds.py",
        "_root(rate / (1 - rate)).to(x.dtype) * noise",
        "_root(rate).to(x.dtype) * noise",
        "problems/classification/test_relaxations.py",
    ),
    Mutant(
        "regret against zero, not against λ*",
        "problems/closed_form/linear_regression.py",
        '{"regret": loss - least}',
        '{"regret": loss}',
        "problems/closed_form/test_exact.py",
    ),
    Mutant(
        "a sampled rate is not refused",
        "bilevel/requirements.py",
        "if Need.INNER_DERIVATIVE in needs and not domain.differentiable:",
        "if False and not domain.differentiable:",
        "bilevel/test_requirements.py",
    ),
    Mutant(
        "an image moved to the other side",
        "problems/classification/image_transforms.py",
        "c, d, -(c * dx + d * dy)",
        "c, d, c * dx + d * dy",
        "problems/classification/test_augmentation.py",
    ),
    Mutant(
        "proximity without its half",
        "problems/few_shot/problem.py",
        '.sum() + 0.5 * hypers["proximity"] * own',
        '.sum() + hypers["proximity"] * own',
        "problems/few_shot/test_few_shot.py",
    ),
    Mutant(
        "weights of examples by their place in the batch",
        "problems/hyper_cleaning.py",
        'hypers["example_weight"][index]',
        'hypers["example_weight"][: len(index)]',
        "problems/test_hyper_cleaning.py",
    ),
    Mutant(
        "t of a paired test without √n",
        "bilevel/comparison/statistics.py",
        "summary.mean / (summary.std / math.sqrt(summary.n))",
        "summary.mean / summary.std",
        "bilevel/comparison/test_comparison.py",
    ),
    Mutant(
        "an error is reported by each law that meets it",
        "bilevel/checks/check_problem.py",
        "if not _repeats(new, report.findings):",
        "if new not in report.findings:",
        "bilevel/checks/test_report.py",
    ),
    Mutant(
        "solvers are listed beside errors",
        "bilevel/checks/check_problem.py",
        "        if not self.ok:\n            return",
        "        if not self.problem:\n            return",
        "bilevel/checks/test_report.py",
    ),
    Mutant(
        "the highest loss of a column is marked as the best",
        "bilevel/comparison/table.py",
        'sign = 1 if column.better == "low" else -1',
        'sign = -1 if column.better == "low" else 1',
        "bilevel/comparison/test_tables.py",
    ),
    Mutant(
        "a group with a diverged run gets the mark of the best",
        "bilevel/comparison/table.py",
        "if sound[row] and found.n == found.of",
        "if found.n == found.of",
        "bilevel/comparison/test_tables.py",
    ),
    Mutant(
        "a comparison shows λ at the start as the one found",
        "bilevel/comparison/hyper_table.py",
        "found = {label: _values(members, name, -1)",
        "found = {label: _values(members, name, 0)",
        "bilevel/comparison/test_tables.py",
    ),
    Mutant(
        "a wide table loses its last column",
        "bilevel/comparison/wide_table.py",
        "for index in range(fixed, len(widths)):",
        "for index in range(fixed, len(widths) - 1):",
        "bilevel/comparison/test_tables.py",
    ),
    Mutant(
        "an arithmetic band on a logarithmic axis",
        "bilevel/comparison/curves.py",
        "middle, low, high = self.geometric",
        "middle, low, high = self.mean, self.mean - self.std, self.mean + self.std",
        "bilevel/comparison/test_plots.py",
    ),
    Mutant(
        "first order follows the response of w",
        "solvers/first_order.py",
        "        return self.core.weights.detached()",
        "        w = self.core.weights.detached()\n"
        "        return {name: leaf * (1 + offset.sum()) for name, leaf in w.items()}",
        "problems/architecture/test_architecture.py",
    ),
    Mutant(
        "a share has the rows of the first for weights that vary per example",
        "bilevel/parallel/sharded_problem.py",
        "varying[shard.rows]",
        "varying[: shard.size]",
        "bilevel/parallel/test_two_processes.py",
    ),
    Mutant(
        "shares of unequal size counted alike",
        "bilevel/parallel/shards.py",
        "return self.size / self.whole",
        "return 0.5",
        "bilevel/parallel/test_two_processes.py",
    ),
    Mutant(
        "the gradient through batch-norm statistics not summed over processes",
        "bilevel/parallel/batch_norm.py",
        "return enter(self.ranks, [mean.to(x.dtype), (square - mean.square()).to(x.dtype)])",
        "return [mean.to(x.dtype), (square - mean.square()).to(x.dtype)]",
        "bilevel/parallel/test_two_processes.py",
    ),
    Mutant(
        "the damping left in the residual that is reported",
        "solvers/implicit.py",
        "r.add_(solved.x * damping)",
        "r.add_(solved.x * 0)",
        "solvers/test_implicit.py",
    ),
    Mutant(
        "Ray starts a run again whose process has died",
        "bilevel/cli/ray_launcher.py",
        "max_retries=0",
        "max_retries=1",
        "bilevel/cli/test_ray_launcher.py",
    ),
    Mutant(
        "a signal is kept from the runs on Ray",
        "bilevel/cli/ray_launcher.py",
        "if signals.received and not announced:",
        "if announced:",
        "bilevel/cli/test_ray_launcher.py",
    ),
    Mutant(
        "a run on Ray whose process died is not among the failures",
        "bilevel/cli/ray_launcher.py",
        "            _note_failure(sentence, config)\n",
        "",
        "bilevel/cli/test_ray_launcher.py",
    ),
    Mutant(
        "a stored target judged by its path, not by the place of its definition",
        "bilevel/cli/stored.py",
        'home = getattr(target, "__module__", None)',
        "home = path",
        "bilevel/cli/test_untrusted.py",
    ),
    Mutant(
        "compressed checkpoints unpacked",
        "bilevel/checkpoint/file_format.py",
        "            _check_size(file)\n",
        "",
        "bilevel/cli/test_untrusted.py",
    ),
    Mutant(
        "a checksum that is not compared",
        "bilevel/checkpoint/file_format.py",
        "if digest.hexdigest().encode() != seal[2]:",
        "if False:",
        "bilevel/checkpoint/test_checkpoints.py",
    ),
    Mutant(
        "the newest checkpoint moved away, not given a second name",
        "bilevel/checkpoint/checkpoints.py",
        "os.link(newest, older)",
        "os.rename(newest, older)",
        "bilevel/checkpoint/test_checkpoints.py",
    ),
    Mutant(
        "lines that were cut by a full disk not written again",
        "bilevel/loggers/jsonl.py",
        "            self.file.seek(self.durable)",
        "            pass",
        "bilevel/run/test_faults.py",
    ),
    Mutant(
        "a class may lose its last training image to validation",
        "problems/datasets/validation_split.py",
        "torch.where(shares + 1 < sizes,",
        "torch.where(shares < sizes,",
        "problems/datasets/test_validation_split.py",
    ),
    Mutant(
        "what a captured step binds anew stays where the recording left it",
        "bilevel/run/cuda_graph.py",
        "            if cell.value is not old and cell.value is not None:\n"
        "                self._keep(cell, cell.value)\n",
        "            pass\n",
        "bilevel/run/test_cuda_graph.py",
    ),
    Mutant(
        "the rate of each example on interleaved rows",
        "bilevel/dropout/calls.py",
        "x.unflatten(0, (len(rate), -1)), rate, self.generator).flatten(0, 1)",
        "x.unflatten(0, (-1, len(rate))).transpose(0, 1), rate, self.generator)"
        ".transpose(0, 1).flatten(0, 1)",
        "bilevel/dropout/test_tuned_dropout.py",
    ),
    Mutant(
        "tuned dropout in evaluation too",
        "bilevel/dropout/calls.py",
        "if not (training and isinstance(p, Rate) and p.hyper is not None):",
        "if not (isinstance(p, Rate) and p.hyper is not None):",
        "bilevel/dropout/test_tuned_dropout.py",
    ),
    Mutant(
        "label smoothing without the weights of the classes",
        "bilevel/cross_entropy.py",
        "ε / classes * weighted.sum(1)",
        "ε / classes * losses.sum(1)",
        "bilevel/test_cross_entropy.py",
    ),
    Mutant(
        "the decay of AdamW at λ, without the preconditioner",
        "solvers/optim/weight_decay.py",
        'return κ * ((square / (1 - group["betas"][1] ** steps)).sqrt() + group["eps"])',
        "return κ * torch.ones_like(square)",
        "solvers/optim/test_tuned_decay.py",
    ),
    Mutant(
        "implicit differentiation forgets that λ holds the decay",
        "solvers/implicit.py",
        "return cross(solved.x) if decay is None else cross(solved.x) + decay.cross(u, solved.x)",
        "return cross(solved.x)",
        "solvers/optim/test_tuned_decay.py",
    ),
    Mutant(
        "the response is fitted to the decay at λ₀, not at λ₀ + ε",
        "solvers/self_tuning.py",
        "return self.decayed(loss, params, w0, hypers), detached(carry)",
        "return self.decayed(loss, params, w0), detached(carry)",
        "solvers/optim/test_tuned_decay.py",
    ),
    Mutant(
        "dropout of channels forgets what it drops from",
        "problems/networks/building_blocks.py",
        "return x if drop is keep else x * drop(",
        "return x if drop is keep else x.new_ones(x.shape) * drop(",
        "problems/networks/test_networks.py",
    ),
    Mutant(
        "a user's loop trains a copy of the module",
        "bilevel/tuner/tuner.py",
        "services.leaves = self._weights()",
        "services.leaves = None",
        "bilevel/tuner/test_attach.py",
    ),
    Mutant(
        "the user's schedule does not reach the response",
        "bilevel/tuner/tuner.py",
        "        self._followers.follow()\n",
        "",
        "bilevel/tuner/test_attach.py",
    ),
    Mutant(
        "statistics of batch norm do not reach the user's module",
        "bilevel/tuner/tuner.py",
        "own[name].copy_(value)",
        "own[name].copy_(own[name])",
        "bilevel/tuner/test_attach.py",
    ),
    Mutant(
        "a loss of NaN stays the best evaluation of a user's loop",
        "bilevel/tuner/history.py",
        'if record["valid_loss"] < lowest:',
        'if not record["valid_loss"] >= lowest:',
        "bilevel/test_bad_inputs.py",
    ),
    Mutant(
        "half of a state that does not fit is used",
        "bilevel/tuner/tuner.py",
        "self._followers = None  # half",
        "pass  # half",
        "bilevel/test_bad_inputs.py",
    ),
    Mutant(
        "a check does not see a class out of range in our own loss",
        "bilevel/cross_entropy.py",
        "if has_torch_function((logits, labels)):",
        "if False:",
        "bilevel/test_bad_inputs.py",
    ),
    Mutant(
        "a result loses its records when the working directory changes",
        "bilevel/run/result.py",
        "directory.absolute()",
        "directory",
        "bilevel/test_bad_inputs.py",
    ),
    Mutant(
        "the network of a result is that of the end, not the best one",
        "bilevel/run/result.py",
        '{"best": best, "last": last}',
        '{"best": last, "last": last}',
        "bilevel/run/test_result.py",
    ),
    Mutant(
        "the test split is not tried before the first step",
        "bilevel/checks/splits.py",
        "data._asdict().items() if stream is not None]",
        'data._asdict().items() if stream is not None and name != "test"]',
        "bilevel/checks/test_splits.py",
    ),
    Mutant(
        "a class out of range that is not in the first rows is not tried",
        "bilevel/data/fields.py",
        "rows.append(torch.stack([flat.argmin(), flat.argmax()]) // width)",
        "rows.append(torch.zeros(1, dtype=torch.int64) // width)",
        "bilevel/checks/test_splits.py",
    ),
    Mutant(
        "NaN in the data refused, though the losses mask it",
        "bilevel/checks/trial.py",
        "if not all(map(_finite, results)):",
        "if results:",
        "bilevel/checks/test_splits.py",
    ),
    Mutant(
        "a resumed run that compares no values of its data",
        "bilevel/run/fingerprint.py",
        'if not _same(old["rows"], new["rows"]):',
        "if not new:",
        "bilevel/run/test_fingerprint.py",
    ),
    Mutant(
        "a search whose trials all diverge finishes with its untrained start",
        "solvers/black_box/search.py",
        "if self.best is not None or running or failed == 0",
        "if True or running or failed == 0",
        "bilevel/checks/test_splits.py",
    ),
    Mutant(
        "a solver is not returned to its state after its sensitivities",
        "bilevel/run/sensitivities.py",
        "        solver.load_state_dict(held)\n        services.capture",
        "        services.capture",
        "bilevel/run/test_sensitivities.py",
    ),
    Mutant(
        "the curvature over one step in place of two",
        "bilevel/run/sensitivities.py",
        "/ (2 * step[k])",
        "/ step[k]",
        "bilevel/run/test_sensitivities.py",
    ),
    Mutant(
        "the standard error without the lost degree of freedom",
        "bilevel/run/sensitivities.py",
        "* n / (n - 1))",
        ")",
        "bilevel/run/test_sensitivities.py",
    ),
    Mutant(
        "a frozen hyperparameter becomes a parameter of a study",
        "bilevel/studies.py",
        "        if name in space and space[name].frozen:\n            continue\n",
        "",
        "bilevel/test_studies.py",
    ),
    Mutant(
        "a whole number at the end of its range is no start",
        "bilevel/studies.py",
        "ends = domain.low + INSIDE, domain.high - INSIDE",
        "ends = domain.low, domain.high",
        "bilevel/test_studies.py",
    ),
    Mutant(
        "a search forgets its history",
        "solvers/black_box/search.py",
        "past=past_trials(self.history, self.box, self._sampler)",
        "past=()",
        "solvers/black_box/test_history.py",
    ),
    Mutant(
        "a start from a study drops the other settings of the space",
        "bilevel/cli/study.py",
        'changes[name] = {**changes.get(name, {}), "init": space[name].init}',
        'changes[name] = {"init": space[name].init}',
        "bilevel/cli/test_study.py",
    ),
    Mutant(
        "the password of a storage is kept in the configuration",
        "bilevel/cli/study.py",
        '"storage": without_password(given["storage"])',
        '"storage": given["storage"]',
        "bilevel/cli/test_study.py",
    ),
    Mutant(
        "a mistyped storage becomes a new file",
        "bilevel/cli/study.py",
        'if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():',
        "if url is None:",
        "bilevel/cli/test_study.py",
    ),
    Mutant(
        "a step that MLflow has is sent again",
        "bilevel/loggers/mlflow_logger.py",
        "if self._client is None or step in self._steps:",
        "if self._client is None:",
        "bilevel/loggers/test_mlflow.py",
    ),
    Mutant(
        "a step that MLflow has in part counts as whole",
        "bilevel/loggers/mlflow_logger.py",
        "found[MARK] = found.pop(MARK)",
        "found = {MARK: found.pop(MARK), **found}",
        "bilevel/loggers/test_mlflow.py",
    ),
    Mutant(
        "an error of the thread that writes to MLflow is lost",
        "bilevel/loggers/mlflow_sender.py",
        "failed, self._error = True, error",
        "failed = error is not None",
        "bilevel/loggers/test_mlflow.py",
    ),
    Mutant(
        "the password of an MLflow server is printed",
        "bilevel/loggers/mlflow_logger.py",
        "without_password(address)",
        "address",
        "bilevel/loggers/test_mlflow.py",
    ),
]


def table() -> str:
    """Return the table of docs/mutants.md."""
    lines = ["| error | file | tests that must fail |", "|---|---|---|"]
    for mutant in MUTANTS:
        tests = ", ".join(f"`tests/{test}`" for test in mutant.tests.split())
        lines.append(f"| {mutant.name} | `{mutant.file}` | {tests} |")
    return "\n".join(lines)


def survives(mutant: Mutant | None) -> str | None:
    """Run the tests on a mutated copy (unchanged for None) and return a complaint, or None."""
    with tempfile.TemporaryDirectory() as place:
        for part in PARTS:
            source, target = ROOT / part, Path(place) / part
            if source.is_dir():
                shutil.copytree(
                    source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy(source, target)
        tests = sorted({test for m in MUTANTS for test in m.tests.split()})
        if mutant is not None:
            file = Path(place) / mutant.file
            text = file.read_text()
            if text.count(mutant.old) != 1:
                return f"is out of date: {mutant.file} has its text {text.count(mutant.old)} times"
            file.write_text(text.replace(mutant.old, mutant.new))
            tests = mutant.tests.split()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            *(f"tests/{test}" for test in tests),
        ]
        environment = os.environ | {"PYTHONPATH": place, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    # A fixture may notice it, too; an error without `::` is one of collection.
    failed = done.returncode == 1 and re.search(r"^(FAILED |ERROR .*::)", done.stdout, re.MULTILINE)
    if mutant is None:
        return (
            None
            if done.returncode == 0
            else f"the tests fail on the code as it is:\n{done.stdout[-3000:]}"
        )
    return (
        None
        if failed
        else f"survives {mutant.tests}"
        + ("" if done.returncode == 0 else f":\n{done.stdout[-2000:]}")
    )


def main() -> int:
    """Run all mutants, or those whose name has a word; the exit status is 1 if one survives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("word", nargs="?", default="")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the table of docs/mutants.md")
    options = parser.parse_args()
    if options.table:
        print(table())
        return 0
    chosen = [mutant for mutant in MUTANTS if options.word in mutant.name]
    bad = 0
    with ThreadPoolExecutor(options.workers) as pool:
        for mutant, verdict in zip(
            [None, *chosen], pool.map(survives, [None, *chosen]), strict=True
        ):
            bad += verdict is not None
            name = "(no mutation: every test passes)" if mutant is None else mutant.name
            shown = "ok      " if verdict is None else "SURVIVED"
            print(f"{shown}  {name}  {verdict or ''}".rstrip(), flush=True)
    print(f"{len(chosen) + 1 - bad} passed, {bad} failed")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
