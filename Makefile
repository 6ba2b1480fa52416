.PHONY: test test-all lint format bench-quick

test:
	bash scripts/test.sh

test-all:
	bash scripts/test_all.sh

lint:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

bench-quick:
	for script in benchmarks/bench_*.py; do python $$script --quick || exit 1; done
