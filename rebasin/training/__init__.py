"""Everything that trains networks: data, recipes, the training loop and trajectories on disk."""
