"""Looks inside a traced function: finds where its groups live, and evaluates it with the values found there.

Methods that need activations get them from here, so that no model needs hooks. `program` traces a function
and labels the axes of every value with the groups of a spec. `sites` finds the values at which a group is
read, and the layers of the network; `layers` says what a layer is. `evaluate` runs the program and hands out,
or changes, the values at chosen equations.
"""
