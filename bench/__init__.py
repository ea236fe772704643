"""Microbenchmarks: one file an operation, peers through their own public entry points, results as JSON.

``pytest --benchmark`` measures everything and draws the table; ``python -m bench`` draws it again from what is stored.
"""
