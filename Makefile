# make run · make test · make lint · make soak · make fuzz · make test-container · make bench · make bench-quick
PYTHON ?= python3
VENV := .venv
EXTRAS ?= dev

# Made anew when the dependencies change or when another Python is asked for.
$(VENV)/.installed: pyproject.toml
	@echo "making $(VENV) (once; half a minute)"
	@$(PYTHON) -c 'import sys; sys.exit("gosshd needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 $(MAKECMDGOALS)" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV) || { echo "python3's venv module is missing; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

.PHONY: run test lint soak fuzz test-container bench bench-quick clean
run: $(VENV)/.installed
	@exec $(VENV)/bin/gosshd $(ARGS)

test: $(VENV)/.dev
	$(VENV)/bin/pytest $(ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

soak: $(VENV)/.dev
	GOSSHD_SOAK=1 $(VENV)/bin/pytest -m soak $(ARGS)

fuzz: $(VENV)/.dev
	$(VENV)/bin/python -m tests.fuzz 60

test-container:
	bash tests/container.sh

bench: $(VENV)/.dev
	@$(VENV)/bin/python -m benchmarks $(ARGS)

bench-quick: $(VENV)/.dev
	@$(VENV)/bin/python -m benchmarks --quick $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
