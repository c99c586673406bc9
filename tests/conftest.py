"""Settings for every test: shared compiled programs, no silent broadcasting, one hypothesis profile."""

import os
import shutil
import tempfile

import hypothesis
import jax

# Broadcasting a bias over the wrong axis is the kind of mistake that alignment code makes silently.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Seeds are fixed, as a failure must be repeatable; compilation makes the first example of a shape slow.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
# Of a mutation it only counts whether an example fails, and shrinking one can take a minute.
_PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile(
    "unshrunk", hypothesis.settings.get_profile("repeatable"), phases=_PHASES, print_blob=False
)
hypothesis.settings.load_profile("unshrunk" if "REBASIN_TESTS_CACHE" in os.environ else "repeatable")


def pytest_configure(config):
    """Let the processes of one run share what they compile, which is most of what tests do.

    The folder is new for each run, so that a test which counts compilations starts from none, unless
    REBASIN_TESTS_CACHE names one for several runs, as mutations do.
    """
    if hasattr(config, "workerinput"):  # a worker gets the folder from the process that started it
        return
    folder = os.environ.get("REBASIN_TESTS_CACHE") or tempfile.mkdtemp(prefix="rebasin_tests_")
    config.jax_cache = folder
    for name, value in {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }.items():
        os.environ[name] = value
        jax.config.update(name.lower(), int(value) if value.isdigit() else value)


def pytest_unconfigure(config):
    if hasattr(config, "jax_cache") and config.jax_cache != os.environ.get("REBASIN_TESTS_CACHE"):
        shutil.rmtree(config.jax_cache, ignore_errors=True)
