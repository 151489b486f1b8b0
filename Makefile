# Every target makes the environment first when it is missing (tools/bootstrap); when it is there, that takes no time.
.DEFAULT_GOAL := help
.PHONY: help env demo test test-slurm test-te check lint format format-check types hooks lock clean clean-env

BIN := .venv/bin
# Extra arguments of the command behind the target: make test ARGS="-k rope -x"
ARGS ?=

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env:  ## make .venv from requirements.lock, unless it is up to date
	@tools/bootstrap

demo: env  ## train a small TransXSSM on this machine's CPU, tensor-parallel, and let it write
	$(BIN)/txssm demo $(ARGS)

test: env  ## run all tests but those of tests/cluster: make test ARGS="-k rope"
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/cluster $(ARGS)

test-slurm: env  ## run the tests on three simulated Slurm clusters: needs root and Debian's slurm-wlm and munge
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests/cluster $(ARGS)

test-te: env  ## run tests/te against Transformer Engine, compiled for this machine's CPU: needs g++ and 1 GB
	tools/build_te_cpu
	PYTHONPATH=.venv/transformer_engine_compiled:tests/te $(BIN)/python -m pytest -p te_stub -p no:cacheprovider -n 0 \
	  tests/te/te_checks.py tests/te/te_fp8_checks.py $(ARGS)

check: lint format-check types imports  ## lint, formatting, types, who may import whom: what .ci/run checks

lint: env  ## ruff check
	$(BIN)/ruff check .

format-check: env  ## ruff format --check
	$(BIN)/ruff format --check .

types: env  ## pyright
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 PYRIGHT_PYTHON_GLOBAL_NODE=0 $(BIN)/pyright

imports: env  ## lint-imports: the rooms and rules in pyproject.toml
	$(BIN)/lint-imports

format: env  ## rewrite the files as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: env  ## install the git hooks of .pre-commit-config.yaml
	$(BIN)/pre-commit install

# --universal: one lock for x86_64 and aarch64. --no-config keeps the mirrors of a uv.toml out.
lock: env  ## remake requirements.lock from requirements.txt; make lock ARGS=--upgrade lifts indirect pins too
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile requirements.txt --output-file requirements.lock --quiet \
	  --universal --python-version 3.12 --generate-hashes --no-config $(ARGS)

clean:  ## remove caches and build products; keeps .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

clean-env:  ## remove .venv
	rm -rf .venv .venv.lock
