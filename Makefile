# make run: the main job in an environment of its own.
# make quick: an answer in about a minute: lint, types, the laws on two solvers, one run.
# make test: everything that CI asks for.
# make mutants: break the code on purpose; the tests must notice.
# make soak: kill, stop, crash and fuzz runs.
# make docs: the documentation as a site, in site/.
# make gpu: the tests and benchmarks that need a GPU, within MINUTES=4, in runs/gpu.
# make outside: tests and numbers of others, remade in docs/outside.md (DATA=PATH: where MNIST is).
# make experiments-quick: every table and picture of docs/ at reduced size, in
# runs/experiments-quick; make experiments: the full sizes, in docs/ (DATA=PATH: where MNIST is).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run quick test lint mutants soak docs gpu outside experiments experiments-quick clean

run: .venv/installed
	$(BIN)/bilevel

# xdist's workers share the cores among them; tests that share a fixture stay together.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup
quick test mutants soak: export OMP_NUM_THREADS = 1

quick: lint
	$(PYTEST) tests/solvers/test_laws.py -k "delta_stn or implicit_cg"
	$(BIN)/bilevel problem=ridge runner.epochs=2 runner.progress=none wandb.mode=disabled

test: lint
	$(PYTEST)

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: .venv/tested
	$(BIN)/python -m tests.mutants

# Kill, stop, crash and starve every solver and resume it; fuzz configurations and checkpoints;
# resume and compare run directories that attack; give every problem wrong data.
soak: .venv/tested
	$(BIN)/python -m tests.soak kills
	$(BIN)/python -m tests.soak ends
	$(BIN)/python -m tests.soak fuzz
	$(BIN)/python -m tests.soak hostile
	$(BIN)/python -m tests.soak data

# Not --quiet: hidden warnings do not count as errors.
docs: .venv/tested
	$(BIN)/mkdocs build --strict

experiments experiments-quick: .venv/installed
	$(BIN)/python -m benchmarks.experiments \
		$(if $(findstring quick,$@),--quick) $(if $(DATA),--data "$(DATA)")

gpu: .venv/tested
	$(BIN)/python -m benchmarks.gpu $(if $(MINUTES),--minutes $(MINUTES))

# Peers that are not installed are skipped; `pip install -e .[peers]` installs them.
outside: .venv/installed
	$(BIN)/python -m benchmarks.outside $(if $(DATA),--data "$(DATA)")

# The stamps: an installation is repeated when pyproject.toml changes, and only then.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
