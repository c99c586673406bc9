"""Compiler options: taken where XLA knows them, left out where it does not."""

from types import MappingProxyType

import jax

from rebasin import compilation


def test_unknown_options_are_left_out(monkeypatch):
    options = {"xla_cpu_no_such_option": "1", "xla_cpu_enable_fast_math": False}
    monkeypatch.setattr(compilation, "_CPU", MappingProxyType(options))
    monkeypatch.setattr(compilation, "_known_options", compilation._known_options.__wrapped__)
    assert compilation.compiler_options() == {"xla_cpu_enable_fast_math": False}


def test_other_platforms_get_none(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compilation.compiler_options() == {}


def test_a_function_compiles_under_them():
    assert jax.jit(lambda x: x + 1, compiler_options=compilation.compiler_options())(1) == 2
