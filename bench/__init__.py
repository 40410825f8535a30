"""Measurements of courier_fast, run from the repository root: python -m bench.loss --shape paper."""
