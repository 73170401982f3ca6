"""Measurements of jax-ifa beside its rivals: see README.md."""
