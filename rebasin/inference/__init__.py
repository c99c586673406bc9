"""Infers the permutation symmetries of a function from its jaxpr, and verifies them numerically."""
