# make quickstart   the main job on real input: MovieLens-100K, two stages, one table
# make evidence     the same data, five seeds, every row, intervals: under an hour
# make slates       the same data, whole slates: HiGR and its rivals, minutes on 2 cores
# make test         lint, types and tests
# make host HOST=path/to/generative-recommenders   an environment for the host, and a check of both
# Each makes its own virtual environment and needs nothing but Python 3.10+ and a network.

PYTHON ?= python3
ML100K ?=
ARGS ?=
WORKERS ?= 2
HOST ?=
HOST_EXTRAS ?= cpu,data,train,host
RUN := .venv
TEST := .venv-test
HOST_ENV := .venv-host
STAMP := .installed

.PHONY: quickstart evidence slates test lint unit host clean

quickstart: $(RUN)/$(STAMP)
	ML100K=$(ML100K) $(RUN)/bin/python -m hpgr_plugin.data.movielens_100k --out downloads/ml-100k
	$(RUN)/bin/python -m hpgr_plugin.main --gin_config_file=configs/runs/quickstart.gin $(ARGS)

evidence: $(RUN)/$(STAMP)
	ML100K=$(ML100K) $(RUN)/bin/python -m hpgr_plugin.data.movielens_100k --out downloads/ml-100k
	$(RUN)/bin/python -m hpgr_plugin.main --gin_config_file=configs/runs/ml-100k_evidence.gin $(ARGS)

slates: $(RUN)/$(STAMP)
	ML100K=$(ML100K) $(RUN)/bin/python -m hpgr_plugin.data.movielens_100k --out downloads/ml-100k
	$(RUN)/bin/python -m hpgr_plugin.main --gin_config_file=configs/runs/ml-100k_slates.gin $(ARGS)

test: lint unit

lint: $(TEST)/$(STAMP)
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy

unit: $(TEST)/$(STAMP)
	OMP_NUM_THREADS=1 $(TEST)/bin/python -m pytest -n $(WORKERS) $(ARGS)

# On a machine with a GPU: HOST_EXTRAS=cuda,data,train,host-cuda
host: $(HOST_ENV)/$(STAMP)
	@test -d "$(HOST)" || { echo "error: HOST=$(HOST) is no folder; make host HOST=path of a checkout"; exit 2; }
	PYTHONPATH="$(HOST)" $(HOST_ENV)/bin/python -m hpgr_plugin.hosts

$(RUN)/$(STAMP): setup.cfg setup.py pyproject.toml
	$(PYTHON) -m venv $(RUN)
	$(RUN)/bin/python -m pip install --quiet --editable '.[cpu,data,train,analysis]'
	touch $@

$(TEST)/$(STAMP): setup.cfg setup.py pyproject.toml
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python -m pip install --quiet --editable '.[cpu,data,train,analysis,serve,dev]'
	touch $@

$(HOST_ENV)/$(STAMP): setup.cfg setup.py pyproject.toml
	$(PYTHON) -m venv $(HOST_ENV)
	$(HOST_ENV)/bin/python -m pip install --quiet --editable '.[$(HOST_EXTRAS)]'
	$(HOST_ENV)/bin/python -m pip install --quiet --no-deps \
	    $$($(HOST_ENV)/bin/python -m hpgr_plugin.hosts --no_deps)
	touch $@

clean:
	rm -rf $(RUN) $(TEST) $(HOST_ENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
