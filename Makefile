.PHONY: test test-all lint format

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
