.PHONY: install test lint bench gpu

install:
	pip install -e ".[test,dev]"

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	mypy

bench:
	python -m bench

gpu:
	python -m bench.gpu --out build/gpu
