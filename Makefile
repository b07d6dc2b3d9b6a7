# What a developer does most; CONTRIBUTING.md explains. PYTHON names another Python, as in `make fast PYTHON=python3.12`.
.PHONY: help fast test nightly lint docs lock
export PYTHON

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

fast: ## the pure tests, in a few minutes
	bash tests/run.sh fast

test: ## all tests
	bash tests/run.sh

nightly: ## all tests, every fault at every phase, a long soak
	bash tests/run.sh nightly

lint: .venv ## format, lint and types, as CI checks them
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

docs: .venv ## what of docs/ is made from the code, and the site in docs/_site
	.venv/bin/dpdist settings --markdown > docs/settings.md.new
	mv docs/settings.md.new docs/settings.md
	.venv/bin/python docs/pictures/draw.py
	.venv/bin/python -m sphinx -q -W --keep-going -b html docs docs/_site

lock: ## the newest versions that pyproject.toml allows, as requirements/test-pyXYZ.txt of this Python
	bash requirements/lock.sh

.venv:
	DPDIST_EXTRAS=test bash -c 'set -euo pipefail; . launch/environment.sh'
