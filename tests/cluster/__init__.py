"""Schedulers for real, on virtual nodes of one host: `pytest -m cluster`."""
