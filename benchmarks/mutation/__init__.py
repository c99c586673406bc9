"""Mutations of the code, and the tests that have to notice them."""
