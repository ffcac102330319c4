# Every target that runs Python first brings .venv up to date (instant when nothing changed).

PYTHON := .venv/bin/python
# Tests without an engine run side by side; one engine takes all cores.
UNIT_TESTS = $(PYTHON) -m pytest tests/unit --numprocesses 2 --dist worksteal
# What only benchmarks and the training of examples use is left to `make test`.
NOT_QUICK = $(patsubst %,--ignore=tests/unit/%,peers recall_training retrieval_quality world)
RUNS ?= 100000
BENCH ?=

# Tests and examples stay offline and send nothing anywhere.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export TOKENIZERS_PARALLELISM := false
# GiB of KV cache of an engine on CPU; the models used here need little.
VLLM_CPU_KVCACHE_SPACE ?= 1
VLLM_LOGGING_LEVEL ?= WARNING
export VLLM_CPU_KVCACHE_SPACE VLLM_LOGGING_LEVEL

.DEFAULT_GOAL := help
.PHONY: help setup demo test check check-static bench fuzz format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## create .venv from requirements.lock
	@scripts/setup.sh

demo: export VLLM_LOGGING_LEVEL := ERROR
demo: setup ## several agents sharing memories on a real vLLM engine
	@$(PYTHON) examples/multi_agent_demo.py

test: check-static ## static checks and all tests (TESTS=path limits the tests)
	@scripts/browser.sh
ifdef TESTS
	@$(PYTHON) -m pytest $(TESTS)
else
	@$(UNIT_TESTS)
	@$(PYTHON) -m pytest tests/engine
endif

check: check-static ## static checks and the quick unit tests, without vLLM
	@$(UNIT_TESTS) -m "not slow" $(NOT_QUICK)

check-static: setup ## formatting, lint and types
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy --strict kv_agent

bench: setup ## speed with the plugin against the same without it, half an hour (BENCH=--quick: two minutes)
	@$(PYTHON) -m benchmarks.speed $(BENCH)

fuzz: setup build/fuzz/packages ## coverage-guided fuzzing of the blob reader (RUNS=100000 inputs)
	@PYTHONPATH=build/fuzz/packages:. $(PYTHON) tests/fuzz/blob_header.py -runs=$(RUNS) -max_len=20000 build/fuzz

build/fuzz/packages: tests/fuzz/requirements.txt
	@$(PYTHON) -m pip install --quiet --upgrade --target $@ -r $<
	@touch $@

format: setup ## format the code and fix what lint can fix
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m ruff check --fix .

lock: setup ## renew requirements.lock (PIP_ARGS=... goes to pip)
	@$(PYTHON) scripts/lock.py $(PIP_ARGS)

clean: ## remove caches and build outputs; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
