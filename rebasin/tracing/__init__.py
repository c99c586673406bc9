"""Looking inside a traced function: where its groups live, and its evaluation with the values found there.

Methods that need activations get them from here, so that no model needs hooks: `program` traces a function
and labels the axes of every value with the groups of a spec, `sites` finds the values that carry a group and
the layers that produce them, `evaluation` runs the program and hands out, or changes, what passes there, and
`streaming` does so over a whole split in one compiled program.
"""
