"""Matching methods: one file each, one result type."""
