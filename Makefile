# Two commands for trying and testing; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help run test check e2e bench kill-storm kill-storm-short crash-matrix crash-matrix-tenth conformance kill-storm-real bulkhead mutants test-rabbitmq4 lock docs-reference clean

help: ## list the commands
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort

run: $(VENV)/run.stamp ## a demonstration with a broker of its own and five sample records
	@$(BIN)/python -m tools.demo

# Most tests wait for servers; each process starts its own.
TEST_PROCESSES ?= 3

test: $(VENV)/dev.stamp ## install and start what the tests need, run them all, stop it all
	@sh tools/packages.sh rabbitmq postgresql
	$(BIN)/python -m pytest tests -n $(TEST_PROCESSES) --dist loadfile --cov --cov-report=term:skip-covered -q

check: $(VENV)/dev.stamp ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

e2e: $(VENV)/dev.stamp ## 200 records through a real broker, a real CDCS and the archive, compared byte by byte
	@sh tools/packages.sh rabbitmq
	@$(BIN)/python -m tools.e2e

bench: $(VENV)/dev.stamp ## queue to confirmed outcome, beside a bare aio-pika loop and FastStream
	@sh tools/packages.sh rabbitmq
	@$(BIN)/python -m benchmarks.overhead

kill-storm: $(VENV)/dev.stamp ## records under hundreds of kill -9, checked against the servers' own ledgers
	@sh tools/packages.sh rabbitmq
	@$(BIN)/python -m tests.storm.run --records 2000 --kills 200 --seed 7

crash-matrix: $(VENV)/dev.stamp ## one crash at each effect that a record has, then restart and compare
	@sh tools/packages.sh rabbitmq postgresql
	@$(BIN)/python -m tests.crash.run --database both

# Parts of the two proofs above that fit into a merge; another part each day, and the seed is printed.
SEED ?= $(shell date +%Y%m%d)

kill-storm-short: $(VENV)/dev.stamp ## the same in two minutes
	@sh tools/packages.sh rabbitmq
	@$(BIN)/python -m tests.storm.run --records 120 --kills 12 --minutes 2 --seed $(SEED)

crash-matrix-tenth: $(VENV)/dev.stamp ## a tenth of the crash matrix, drawn anew each day
	@sh tools/packages.sh rabbitmq postgresql
	@$(BIN)/python -m tests.crash.run --database both --tenth $(SEED)

conformance: $(VENV)/dev.stamp ## forty wire faults between each destination and its server, twelve disk faults for the archive
	@$(BIN)/python -m tools.conformance

kill-storm-real: $(VENV)/dev.stamp ## the same to a real CDCS, both notebooks and the archive, with links that come late
	@sh tools/packages.sh rabbitmq
	@$(BIN)/python -m tests.storm_real.run --records 200 --kills 50 --seed 7

bulkhead: $(VENV)/dev.stamp ## nine ways in which one destination could disturb the others, measured
	@sh tools/packages.sh rabbitmq postgresql
	@$(BIN)/python -m benchmarks.bulkhead

mutants: $(VENV)/dev.stamp ## take out each guarantee once and see its test fail
	@sh tools/packages.sh rabbitmq postgresql
	@$(BIN)/python -m tools.mutants

test-rabbitmq4: $(VENV)/dev.stamp ## the integration tests against RabbitMQ 4 of Debian 13 (needs root)
	@sh tools/packages.sh rabbitmq postgresql debootstrap
	@$(BIN)/python -m tools.servers.debian13

docs-reference: $(VENV)/dev.stamp ## write the schemas in docs/reference from the models
	$(BIN)/nexus-export schema --write docs/reference

lock: $(VENV)/dev.stamp ## pin the requirements anew
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile pyproject.toml --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.11 -o requirements/run.txt
	$(BIN)/uv pip compile pyproject.toml --extra dev -c requirements/run.txt --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.11 -o requirements/dev.txt

clean: ## remove what the commands above made
	rm -rf $(VENV) .demo .services .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/run.stamp: requirements/run.txt pyproject.toml
	@sh tools/venv.sh $(PYTHON) $(VENV) requirements/run.txt
	@touch $@

$(VENV)/dev.stamp: requirements/dev.txt pyproject.toml
	@sh tools/venv.sh $(PYTHON) $(VENV) requirements/dev.txt
	@touch $@ $(VENV)/run.stamp
