# Two commands for everyone: `make run` and `make test`. Both set up .venv first, if it is not there.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { command -v $$p; break; }; done)
BIN := .venv/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
CLEAN := $(BIN)/nbstripout --keep-output --keep-count --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution"

.PHONY: run report lab test test-more notebooks lint lock audit

run: .venv/ready
	$(BIN)/python run_all.py params/quick.yaml

report: .venv/ready
	$(BIN)/python -m datawall.reading.report runs/quick

lab: .venv/ready
	$(BIN)/jupyter lab --ip 127.0.0.1 notebooks/01_curation.ipynb

test: .venv/ready  # the notebooks find the study made, so that two can run at a time
	$(BIN)/python -m datawall.cells.datasets
	$(BIN)/python run_all.py params/quick.yaml
	$(BIN)/python -m pytest -n 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder notebooks tests

test-more: .venv/ready .venv/moto/bin/moto_server  # what takes longer, or more than a clone: all faults, and an object store's server
	DATAWALL_TESTS=more $(BIN)/python -m pytest tests/faults tests/test_shared.py

notebooks: .venv/ready  # execute in place and store the outputs, and the figures
	$(BIN)/python run_all.py params/quick.yaml
	for n in $(NOTEBOOKS); do $(BIN)/jupyter execute --inplace $$n || exit 1; done
	$(CLEAN) $(NOTEBOOKS)
	rm -rf figures && cp -r runs/quick/figures figures
	$(BIN)/python -c "from datawall.engine import code; print(code.session()['code'])" > figures/code.txt
	$(BIN)/python tests/manifest.py

lint: .venv/ready
	$(BIN)/ruff check && $(BIN)/ruff format --check

lock: .venv/ready  # after a change of dependencies
	$(BIN)/python -m pip freeze --all --exclude-editable > requirements.lock
	$(BIN)/python tests/licences.py

.venv/moto/bin/moto_server: | .venv/ready  # an object store's server for tests; it asks for an older python-dateutil than all else here
	$(PYTHON) -m venv .venv/moto
	.venv/moto/bin/python -m pip install --quiet --disable-pip-version-check "moto[server]>=5,<6"

audit:  # known weaknesses of the locked versions, asked of PyPI; in an environment of its own
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	.venv/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement requirements.lock

.venv/ready: pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "datawall needs Python 3.12 or later; install it, or name it: make run PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@
