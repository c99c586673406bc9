"""Settings for every test: no silent broadcasting of ranks, and one deterministic hypothesis profile."""

import hypothesis
import jax

# Broadcasting a bias over the wrong axis is the kind of mistake that alignment code makes silently.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Seeds are fixed, as a failure must be repeatable; compilation makes the first example of a shape slow.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")
