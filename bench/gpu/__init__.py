"""The first hour on a GPU as one command: `python -m bench.gpu --out DIR`. See __main__.py."""
