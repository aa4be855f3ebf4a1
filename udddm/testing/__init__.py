"""Conformance suites to run on your own parts. They need pytest and Hypothesis, which nothing else here imports.

from udddm.testing.store import StoreConformance
"""
