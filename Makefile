.PHONY: install test long lint bench gpu docs

install:
	pip install -e ".[test,dev]"

test:
	pytest

long:
	pytest --long

lint:
	ruff check .
	ruff format --check .
	mypy

bench:
	python -m bench

gpu:
	python -m bench.gpu --out build/gpu

docs:
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build
