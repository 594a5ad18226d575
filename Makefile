# `make help` lists the commands. Everything is installed into .venv, with the versions of constraints.txt.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?=
PORT   ?= 8000
CONFIG ?= serve_config.yaml
ADDRESS ?=
ARGS   ?=
PEER   ?=
INGRESS ?= proxy
STAMP  := $(VENV)/.installed
LAUNCH  = $(BIN)/python -m deployments.launch --config $(CONFIG) $(if $(MODEL),--model $(MODEL)) $(if $(ADDRESS),--address $(ADDRESS))

export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo bench-engine bench-render bench-serve bench-scaling bench-replicas bench-tokens test test-cuda test-faults test-fuzz test-peer test-vllm soak goldens check format serve serve-fast check-config lock clean

help:  ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Make .venv with the pinned dependencies

$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Greenroom needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	@echo "Installing into $(VENV) (once; about two minutes, most of it torch and ray)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on --no-warn-script-location \
		--constraint constraints.txt --editable '.[dev,structured]'
	@touch $@

demo: $(STAMP)  ## Start the application on the demo model, take a tour over HTTP, shut down
	$(BIN)/python -m demo

serve: $(STAMP)  ## Serve in the foreground until Ctrl-C (MODEL=path or hub id, PORT=8000, CONFIG=serve_config.yaml, ADDRESS=a Ray cluster's host:port)
	$(LAUNCH) --port $(PORT)

serve-fast: $(STAMP)  ## The same behind the high-throughput ingress (HAProxy), as production runs
	$(LAUNCH) --port $(PORT) --ingress haproxy

check-config: $(STAMP)  ## Check a Serve config file without starting anything (CONFIG=serve_config.yaml)
	$(LAUNCH) --check

test: $(STAMP)  ## Run the test suite (ARGS='-k name' to choose)
	$(BIN)/python -m pytest $(ARGS)

test-cuda: $(STAMP)  ## Test the embedded engine on this machine's GPU
	$(BIN)/python -m pytest -m cuda tests/cuda $(ARGS)

test-fuzz: $(STAMP)  ## Whatever comes over the wire is read or refused: 20,000 generated cases a decoder
	$(BIN)/python -m pytest -m fuzz --timeout 3600 $(ARGS)

test-peer: $(STAMP)  ## Compare with a live vLLM 0.32 (PEER=its virtual environment)
	GREENROOM_PEER="$(PEER)" $(BIN)/python -m pytest -m peer --timeout 1200 $(ARGS)

test-faults: $(STAMP)  ## Test with real faults under load: what is killed, updated, scaled, flooded (half an hour on two cores; INGRESS=haproxy)
	GREENROOM_INGRESS=$(INGRESS) $(BIN)/python -m pytest -m faults -v --durations 0 $(ARGS)

soak: $(STAMP)  ## Ten thousand mixed requests with a fault every 20 s (ARGS='--requests 1000 --every 10', INGRESS=haproxy)
	$(BIN)/python -m tests.soak --ingress $(INGRESS) $(ARGS)

goldens: $(STAMP)  ## Record the answers of vLLM 0.32 anew (PEER=its virtual environment, or the address of its renderer)
	$(BIN)/python -m tests.goldens.record "$(PEER)" $(ARGS)

test-vllm: .venv-vllm/.installed  ## Test the vllm backend on vLLM's CPU build, in .venv-vllm
	.venv-vllm/bin/python -m pytest -m vllm -W ignore::pytest.PytestUnraisableExceptionWarning tests/vllm $(ARGS)

.venv-vllm/.installed: constraints.txt pyproject.toml tests/vllm/setup.sh
	bash tests/vllm/setup.sh .venv-vllm $(PYTHON)
	@touch $@

bench-render: $(STAMP)  ## The renderer in process against the bare Hugging Face processor (PEER=vLLM's virtual environment, ARGS=--quick)
	$(BIN)/python -m bench.render $(if $(PEER),--peer $(PEER)) $(ARGS)

bench-serve: $(STAMP)  ## Greenroom's servers against vLLM's render server (PEER=vLLM's virtual environment, ARGS=--quick)
	$(BIN)/python -m bench.serve $(if $(PEER),--peer $(PEER)) $(ARGS)

bench-scaling: $(STAMP)  ## Rendering over cores, in process: threads of one renderer, renderers in processes (ARGS='--counts 1,2,4,8')
	$(BIN)/python -m bench.scaling $(ARGS)

bench-replicas: $(STAMP)  ## Rendering over render replicas, on a cluster of this machine's cores (ARGS='--counts 1,2,4,8')
	$(BIN)/python -m bench.replicas $(ARGS)

bench-tokens: $(STAMP)  ## The time between tokens at a client, while other requests are rendered, for each way to borrow
	$(BIN)/python -m bench.tokens $(ARGS)

bench-engine: $(STAMP)  ## The embedded engine against model.generate (ARGS='--size 3b' on a GPU)
	$(BIN)/python -m bench.engine $(ARGS)

check: $(STAMP)  ## Formatting, lint, strict types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(STAMP)  ## Write constraints.txt from what .venv holds
	{ echo "# The versions that everybody gets, written by \`make lock\`."; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.txt

clean:  ## Remove .venv and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
