"""Compiler options: taken where XLA knows them, left out where it does not."""

import jax

from rebasin.compilation import compiler_options, known_options


def test_unknown_options_are_left_out():
    options = {"xla_cpu_no_such_option": "1", "xla_cpu_enable_fast_math": False}
    assert known_options(options) == {"xla_cpu_enable_fast_math": False}


def test_other_platforms_get_none(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler_options() == {}


def test_a_function_compiles_under_them():
    assert jax.jit(lambda x: x + 1, compiler_options=compiler_options())(1) == 2
