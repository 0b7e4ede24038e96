# Every target prints what it runs. `make demo` and `make test` do all the set-up they need.
PYTHON ?= python3
VENV := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH):/usr/sbin:/sbin

.PHONY: help setup tools demo demo-session test test-unit test-integration faults check fmt lint types \
	imports sizes proto proto-check docs docs-check bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what building and the demo need
	PYTHON=$(PYTHON) deploy/setup.sh demo

tools: ## install everything, for tests and benchmarks too
	PYTHON=$(PYTHON) deploy/setup.sh test

demo: setup ## run the main job on real parts: two nodes, one cache, two members
	$(VENV)/python examples/demo.py

demo-session: ## docker run on a node: a session with a port and a directory of this machine
	PYTHON=$(PYTHON) deploy/setup.sh session
	$(VENV)/python examples/session_demo.py

test: tools check ## all checks and tests
	deploy/run_tests.sh

test-unit: tools ## tests that need neither network nor root
	$(VENV)/pytest tests/unit

test-integration: tools ## tests on real BuildKit, MinIO, engines and registries
	$(VENV)/pytest tests/integration tests/e2e

faults: tools ## the fault list as a report: bad input and faults, each on real parts
	$(VENV)/pytest tests/e2e/test_faults.py -v -p no:randomly --no-header

check: lint types imports sizes proto-check docs-check ## everything that a change must pass before its tests

fmt: tools ## format the code
	$(VENV)/ruff check --fix-only --quiet .
	$(VENV)/ruff format .

lint: tools ## ruff
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

types: tools ## mypy, strict
	$(VENV)/mypy

imports: tools ## the import rules of docs/architecture.md
	$(VENV)/lint-imports

sizes: ## no module above 600 lines
	$(PYTHON) deploy/check_sizes.py

proto: tools ## generate the protobuf code
	$(VENV)/python proto/generate.py

proto-check: tools ## the generated code is what the .proto files say
	$(VENV)/python proto/generate.py --check

docs: tools ## generate the tables in docs/
	$(VENV)/python deploy/generate_docs.py

docs-check: tools ## the tables in docs/ are what the code says
	$(VENV)/python deploy/generate_docs.py --check

bench: tools ## the benchmarks; one alone: python -m benchmarks run NAME
	$(VENV)/python -m benchmarks run main

clean: ## remove what the other targets made
	rm -rf .venv .tools .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f examples/*/busybox
