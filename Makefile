SHELL := bash
.PHONY: test test-all lint format bench-quick

test:
	bash scripts/test.sh

test-all:
	bash scripts/test_all.sh

lint:
	source scripts/_env.sh && ruff check . && ruff format --check .

format:
	source scripts/_env.sh && ruff check --fix . && ruff format .

bench-quick:
	source scripts/_env.sh && for script in benchmarks/bench_*.py; do $$PYTHON $$script --quick || exit 1; done
