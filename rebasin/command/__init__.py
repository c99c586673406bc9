"""The command ``rebasin``: align, inspect and merge checkpoints from a shell."""
