# Everything runs in .venv, which the first target makes. On another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
SEED ?= 0
NUM ?= 100
PROCESSES ?= $(shell nvidia-smi --list-gpus 2> /dev/null | grep -c GPU | grep -v '^0$$' || echo 2)
RUN := .venv/bin/python

.PHONY: demo test test-slow score tiny lint clean .venv

.venv: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(RUN) -m pip install --editable ".[train,test]"
	touch $@

demo: .venv/installed
	$(RUN) examples/edit_video.py

# Small tensors: one thread a process beats two, and two processes use two cores.
test: .venv/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

# What takes minutes, such as twenty trainings that are killed at random moments.
test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m slow

# The embedded checkpoint on all levels, NUM items of each. Goes on where it was stopped.
score: .venv/installed
	$(RUN) examples/evaluate.py --num_samples $(NUM) --seed $(SEED) --output out/scores-$(SEED)

# A checkpoint like the embedded one from nothing, in runs/tiny: hours on two CPU cores. Each step goes on where it was
# stopped. The editor's blocks are compiled, which needs a C++ compiler; one process a GPU, or two on CPUs.
TRAIN := OMP_NUM_THREADS=1 $(RUN)
tiny: .venv/installed
	c++ --version > /dev/null
	$(TRAIN) -m torch.distributed.run --nproc_per_node $(PROCESSES) examples/tiny/train_vae.py --output runs/vae
	$(TRAIN) examples/tiny/train_mllm.py --output runs/mllm
	$(TRAIN) examples/tiny/train_text.py --output runs/text
	$(TRAIN) examples/tiny/build.py --vae runs/vae/vae --mllm runs/mllm --text runs/text --output runs/init
	$(TRAIN) -m torch.distributed.run --nproc_per_node $(PROCESSES) examples/train.py \
		--model runs/init --output runs/editor --config examples/tiny/editor.json --resume_from_checkpoint latest
	$(TRAIN) -m torch.distributed.run --nproc_per_node $(PROCESSES) examples/train.py \
		--model runs/editor/pipeline --output runs/editor-17 --config examples/tiny/editor_17_frames.json \
		--resume_from_checkpoint latest
	$(RUN) examples/evaluate.py --model runs/editor-17/pipeline --num_samples $(NUM) --seed $(SEED) --output runs/scores
	$(RUN) examples/tiny/export.py --vae runs/vae --mllm runs/mllm --text runs/text \
		--editor runs/editor runs/editor-17 --scores runs/scores/results.json --output runs/tiny

lint: .venv/installed
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

clean:
	rm -rf out build *.egg-info .pytest_cache .ruff_cache
