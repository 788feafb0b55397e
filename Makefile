# `make help` says what there is to make. Every target sets up .venv first when it has to.
PY := .venv/bin/python
export PYTHON
# How PyTorch's threads wait: escd/waiting.py, for what imports torch before escd, and for notebooks' kernels.
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 1000
export KMP_BLOCKTIME ?= 1
endif

.PHONY: help figures test study pretrain notebooks lab paper clean

help:
	@echo "make figures   draw the paper's figures from the records, then run two of the records again"
	@echo "make test      ruff (rules and format), mypy, pytest and every notebook once"
	@echo "make study     run what the records do not hold yet; stop and go on at any time (WORKERS=n processes)"
	@echo "make pretrain  train the mini backbone from scratch; stop and go on at any time (hours on a CPU)"
	@echo "make notebooks run the notebooks anew and keep their output (NAMES=\"05_sliders ...\": only these)"
	@echo "make lab       open the notebooks in JupyterLab"
	@echo "make paper     build paper/main.pdf (needs LaTeX)"
	@echo "make clean     remove caches and build outputs; .venv and runs/ (training state) stay"
	@echo
	@echo "The first of these sets up .venv. Another Python: make PYTHON=python3.12 test"

.venv/installed: requirements.lock pyproject.toml
	@sh .ci/install

# The Hub is never asked: figures and tests use what is in this clone.
figures: .venv/installed
	HF_HUB_OFFLINE=1 $(PY) -m escd.draw

test: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist worksteal
	@echo "All passed: ruff, mypy, the tests and every notebook. The notebooks as run just now: build/notebooks/"

# One thread a worker, so that two workers give the bits that one gives; a GPU each where there are GPUs.
# --multi_gpu is how accelerate starts several workers, on a CPU too; it refuses to start one.
study: .venv/installed
	workers=$${WORKERS:-$$($(PY) -c 'import os, torch; print(torch.cuda.device_count() or os.cpu_count())')}; \
	if [ "$$workers" -gt 1 ]; then several=--multi_gpu; fi; \
	for what in "--ranks --alike" --methods; do \
		$(PY) -m accelerate.commands.launch $$several --num_processes "$$workers" --num_machines 1 \
			--mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1 \
			-m escd.study $$what || exit; \
	done

pretrain: .venv/installed
	$(PY) -m escd.pretrain

# Their outputs are committed; `make test` runs copies and leaves these as they are.
notebooks: .venv/installed
	HF_HUB_OFFLINE=1 $(PY) .ci/notebooks $(NAMES)

lab: .venv/installed
	$(PY) -m jupyterlab --notebook-dir=notebooks

paper:
	@sh paper/build

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .cache
	rm -f paper/main.aux paper/main.bbl paper/main.blg paper/main.fdb_latexmk paper/main.fls paper/main.log paper/build.log \
		paper/main.out paper/main.pdf
	find escd tests benchmarks notebooks -name __pycache__ -o -name .ipynb_checkpoints | while read -r folder; do \
		rm -rf "$$folder"; done
