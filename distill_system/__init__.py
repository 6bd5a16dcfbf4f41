"""Distil a large language model into a small one by adversarial moment matching, on Ray."""

__version__ = "0.1.0"
