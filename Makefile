# make run: the main job in an environment of its own; make test: everything that CI asks for; make experiments-quick: every table and
# picture of docs/ at reduced size, in runs/experiments-quick; make experiments: the full sizes, in docs/ (DATA=PATH: where MNIST is);
# make docs: the documentation as a site, in site/.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test mutants soak docs experiments experiments-quick clean

run: .venv/installed
	$(BIN)/bilevel

# xdist's workers share the cores among them
test mutants soak: export OMP_NUM_THREADS = 1

test: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

mutants: .venv/tested
	$(BIN)/python -m tests.mutants

# Every solver killed, stopped, crashed and starved of disk, and resumed; then thousands of fuzzed configurations and checkpoints.
soak: .venv/tested
	$(BIN)/python -m tests.soak kills
	$(BIN)/python -m tests.soak fuzz

# Not --quiet: warnings that are not shown are not counted.
docs: .venv/tested
	$(BIN)/mkdocs build --strict

experiments experiments-quick: .venv/installed
	$(BIN)/python -m benchmarks.experiments $(if $(findstring quick,$@),--quick) $(if $(DATA),--data "$(DATA)")

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
