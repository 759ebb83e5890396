"""Tail risks of language models by importance sampling in JAX."""
