"""Why a path between two networks has a barrier: numbers with their sources, and what they say in words."""
