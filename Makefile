# make quickstart   the main job on real input: MovieLens-100K, two stages, one table
# make evidence     the same data, five seeds, every row, intervals: under an hour
# make slates       the same data, whole slates: HiGR and its rivals, minutes on 2 cores
# make test         lint, types and tests
# Each makes its own virtual environment and needs nothing but Python 3.10+ and a network.

PYTHON ?= python3
ML100K ?=
ARGS ?=
RUN := .venv
TEST := .venv-test
STAMP := .installed

.PHONY: quickstart evidence slates test lint unit clean

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
	$(TEST)/bin/python -m pytest $(ARGS)

$(RUN)/$(STAMP): setup.cfg setup.py pyproject.toml
	$(PYTHON) -m venv $(RUN)
	$(RUN)/bin/python -m pip install --quiet --editable '.[cpu,data,train,analysis]'
	touch $@

$(TEST)/$(STAMP): setup.cfg setup.py pyproject.toml
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python -m pip install --quiet --editable '.[cpu,data,train,analysis,dev]'
	touch $@

clean:
	rm -rf $(RUN) $(TEST) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
