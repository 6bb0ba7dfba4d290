# Everything runs in .venv, which the first target makes. On another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
SEED ?= 0
RUN := .venv/bin/python

.PHONY: demo test score tiny lint clean .venv

.venv: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --editable ".[train,test]"
	touch $@

demo: .venv/installed
	$(RUN) examples/edit_video.py

# Small tensors: one thread a process beats two, and two processes use two cores.
test: .venv/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

score: .venv/installed
	$(RUN) examples/evaluate.py --seed $(SEED)

tiny: .venv/installed
	$(RUN) examples/tiny/train_vae.py
	$(RUN) examples/tiny/train_mllm.py

lint: .venv/installed
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

clean:
	rm -rf out build *.egg-info .pytest_cache .ruff_cache
