"""A zoo of small architectures, each with the sizes of its groups, written out by hand.

`specimens` says what an exhibit is; the exhibits stand in the three modules that are imported here.
"""

import zoo_layers
import zoo_programs
import zoo_transformers
from specimens import EXHIBITS, KEY, arrays, sort_key

__all__ = ["KEY", "ZOO", "arrays", "sort_key"]

# The families in the order of the table of architectures, whichever was imported first.
FAMILIES = [family.__name__ for family in (zoo_layers, zoo_transformers, zoo_programs)]
ZOO = {name: exhibit for family in FAMILIES for name, exhibit in EXHIBITS.items() if exhibit.family == family}
