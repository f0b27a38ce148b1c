# make run    judge every MoE kernel on this machine         make test   lint, types, self-tests, a small run (no GPU)
# make lint   ruff and mypy                                  make bench  ratios behind the figures in README
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TIER ?= smoke
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test lint bench soak calibrate fuzz witnesses mutants clean

run: $(READY)
	$(BIN)/moecheck run --tier $(TIER) --verbose

test: lint
	$(BIN)/python -m pytest suites --platform cpu -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m harness.bench

# A thousand cases, 300 of them on kernels that die in one of sixteen ways; then kill -9 of all parts of a run, thirty times.
soak: $(READY)
	MOECHECK_KILLS=30 $(BIN)/python -m pytest -q suites/selftest/test_resume.py
	$(BIN)/python -m harness.faults.storm --cases $(or $(CASES),1000) --faults $(or $(FAULTS),300) --seed $(or $(SEED),0)

# Right kernels on random cases: every alarm is the judge's fault, and the mean of z**2 must be 1.
calibrate: $(READY)
	$(BIN)/python -m harness.calibrate --verdicts $(or $(VERDICTS),10000) --seed $(or $(SEED),0)

# Malformed bundles, journals, plans, YAML and case ids; the last line has the count, the exit status the verdict.
fuzz: $(READY)
	$(BIN)/python -m harness.fuzz --count $(or $(COUNT),5000) --seed $(or $(SEED),0)

$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[cpu,dev]'
	touch $@

# Witnesses too large for the dev extra; CI has them, `make test` skips what is missing and says so.
witnesses: $(READY)
	VENV=$(VENV) .ci/witnesses

# A sample of wrong constants and operators planted in reference/, each of which a self-test must notice.
mutants: $(READY)
	$(BIN)/python suites/mutation.py --sample $(or $(SAMPLE),60) --seed $(or $(SEED),1)

clean:
	rm -rf $(VENV) build *.egg-info
