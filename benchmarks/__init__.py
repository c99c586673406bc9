"""Measurements that are kept out of the tests."""
