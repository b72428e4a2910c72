# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PY     := $(BIN)/python
IMAGE  ?= localhost/loupe
SHELL  := /bin/bash
.SHELLFLAGS := -eo pipefail -c

.DEFAULT_GOAL := help
.PHONY: help setup demo photos data-chain lpips demo-autoencoder test lint types format lock clean golden test-slow test-long bench-gpu \
        test-cluster test-ops test-gpu watch dashboards image image-base image-test export-check

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

setup: $(VENV)/.done ## build .venv with the pinned packages

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev,gallery,s3,kubernetes,tensorboard,wandb]'
	@# its own pins cannot be met beside diffusers; what it imports is among our dependencies (see pyproject.toml)
	$(PY) -m pip install --quiet --no-deps -c constraints.txt mosaicml-streaming
	touch $@

demo: setup ## the main job on embedded defaults: train, be preempted, resume, sample, evaluate (under 10 minutes on two cores)
	$(PY) launch/slurm.py demo --cluster local --gpus-per-node 2 --cpu --run-dir runs/demo --fresh --rehearse-preemption 300
	$(BIN)/loupe evaluate run runs/demo --out runs/demo-evaluation --overwrite

watch: setup ## Prometheus and Alertmanager on this machine beside the runs in runs/ (needs Debian's two)
	$(PY) -m ops.watch

dashboards: setup ## write ops/dashboards/*.json anew from their code
	$(PY) -m ops.dashboards

photos: setup ## the demo's model on a folder of captioned photos: make photos PHOTOS=FOLDER
	@test -n "$(PHOTOS)" || { echo 'say which: make photos PHOTOS=FOLDER'; exit 2; }
	$(BIN)/loupe data build $(PHOTOS) runs/photos-data --overwrite
	$(PY) launch/slurm.py photos --cluster local --gpus-per-node 2 --cpu

data-chain: setup ## raw tars to 50 training steps from an S3 server: make data-chain PHOTOS=FOLDER FACES=yunet.onnx CAPTIONER=FOLDER
	@test -n "$(PHOTOS)" -a -n "$(FACES)" -a -n "$(CAPTIONER)" || { echo 'say PHOTOS=FOLDER FACES=FILE CAPTIONER=FOLDER'; exit 2; }
	$(PY) -m ops.data_chain $(PHOTOS) --faces $(FACES) --captioner $(CAPTIONER)

lpips: setup ## fetch LPIPS's weights (shift-tolerant AlexNet, BSD-2) into models/stlpips
	$(PY) -m ops.fetch_lpips

demo-autoencoder: setup ## train the shipped autoencoder again and put it in its place (LPIPS=FILE: weights that are there)
	$(if $(LPIPS),,$(PY) -m ops.fetch_lpips)
	@# from scratch by L1 + KL; then LPIPS and the discriminator
	$(PY) launch/slurm.py demo_autoencoder --cluster local --gpus-per-node 2 --cpu --fresh --run-dir runs/demo_autoencoder_begun \
	  --set init_from=null --set task.lpips=null --set task.discriminator=null --set optim.betas='[0.9, 0.99]' \
	  --set optim.warmup_steps=100 --set phases.train.steps=2000 --set phases.settle.steps=500 \
	  --set phases.train.learning_rate=1e-3 --set phases.settle.learning_rate=2e-4 \
	  --set phases.train.ema_decay=0.995 --set phases.settle.ema_decay=0.995 --set reconstructions.every_steps=500
	$(PY) launch/slurm.py demo_autoencoder --cluster local --gpus-per-node 2 --cpu --fresh \
	  --set init_from.url=runs/demo_autoencoder_begun $(if $(LPIPS),--set task.lpips.url=$(LPIPS))
	$(BIN)/loupe export runs/demo_autoencoder trainer/assets/demo_autoencoder

export-check: setup ## export runs/demo, draw it in a new environment with torch and diffusers alone, compare (RUN=FOLDER: another run)
	$(PY) tests/check_export.py $(or $(RUN),runs/demo)

test: setup ## all tests (under 15 minutes on two cores)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --durations=30

test-slow: setup ## recordings, stops and hangs of whole runs, every recipe (20 minutes on two cores; CI runs it too)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow -n 2 --dist loadfile --durations=30

test-long: setup ## experiments, the data chain and faults from end to end, killed workers on S3, what benchmarks compute (half an hour)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m long

test-cluster: setup ## jobs on a real SLURM with two nodes, and what pods run (needs SLURM's daemons)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m cluster

test-ops: setup ## alerts by their real causes, on a real Prometheus and Alertmanager
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow_ops

test-gpu: setup ## what needs a CUDA device: bf16, compile, NCCL, memory of the recipes at full width
	$(PY) -m pytest -m gpu

SMALLER = task.model.num_blocks=18 task.model.num_heads=18 task.model.num_dual_attention_blocks=0
bench-gpu: setup ## the step beside a diffusers loop at 856M and 2B, 256 and 512 px, mixed aspects; the price of LPL (needs a CUDA device)
	for options in "--batch-size 16 $(SMALLER)" "--batch-size 16 --stored-latents $(SMALLER)" \
	  "--resolution 256 --batch-size 64 $(SMALLER)" "--resolution 256 --batch-size 16" "--batch-size 4" \
	  "--batch-size 4 --stored-latents" "--batch-size 4 --buckets"; do \
	  $(PY) -m ops.bench.step --recipe sd3_medium_512 --compile $$options || exit 1; \
	done
	$(PY) -m ops.bench.lpl --step

image: setup ## build the training image: make image [IMAGE=NAME] [BASE=IMAGE] [WHEELS=FOLDER of wheels that go before the index's]
	PYTHON=$(PY) BASE="$(BASE)" WHEELS="$(WHEELS)" ops/image/build.sh $(IMAGE)

image-base: ## a Debian to build the image on, where no registry is reached; then: make image BASE=localhost/loupe-base
	ops/image/base.sh localhost/loupe-base

image-test: setup ## train in the image: unprivileged, read-only, preempted, resumed; what its layers hold (minutes)
	$(PY) -m ops.image.check $(IMAGE) $(if $(BASE),--base $(BASE))

golden: setup ## record the demo recipe's losses anew, after a change that is meant to change them
	$(PY) -m tests.golden

lint: setup ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy over the whole tree
	$(BIN)/mypy

format: setup ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup ## renew constraints.txt from pyproject.toml, with uv (`pip install uv` into .venv first)
	{ sed -n '/^#/p' constraints.txt; \
	  $(BIN)/uv pip compile -q pyproject.toml --all-extras --python-version 3.11 --no-emit-index-url \
	    --no-emit-find-links --no-annotate --no-header | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt

clean: ## remove .venv and caches; runs/ stays, it may hold days of training
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
