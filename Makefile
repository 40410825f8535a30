.PHONY: install test lint bench

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
