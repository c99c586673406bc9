"""The command ``rebasin``: align, diagnose, inspect and merge checkpoints from a shell."""
