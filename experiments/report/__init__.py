"""One report of all experiments: what is a part of the papers, what runs for it, and what was measured."""
