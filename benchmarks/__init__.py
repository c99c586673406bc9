"""Measurements of time, memory and quality that are kept out of the tests.

Each benchmark is one file with a ``main``; run it as ``python -m benchmarks.<name>``, and add ``--help`` to
see its flags.

  weight_matching    time, objective and barrier of weight matching, next to git-re-basin's loop
                     (`make bench`); its tables are in weight_matching_report
  against_version    time and result of weight matching, next to another checkout of this repository
  planted_recovery   how often matching undoes a random permutation exactly
  symmetry           how much weight matching depends on which network moves and on the order of units
  digits_methods     barriers of every matching method, and of merging several networks, on digits
  repair             barriers of BatchNorm networks with REPAIR and with new running statistics
  throughput         training and sweeps in images per second, next to PyTorch
  masked_training    training with several masks: one by one, in threads, and as one program
  memory             memory of matching and of passes over data
  inference_time     seconds that inferring a spec takes
  public_models      what inference finds on public models of transformers, diffusers and other packages
                     (`make public-models`); public_zoo builds them
  attack             what comes of kills, races, full disks, damaged files and malformed inputs
                     (`make attack`)
  house              size of the code, and how much of it one call enters

What they share:

  architectures      models with their specs, and networks of Gaussian weights
  problems           pairs of networks to match: Gaussian ones, and those that the experiments trained
  methods            the weight matchings that are compared; git_rebasin has the loop of git-re-basin
  torch_networks     the models of this repository in PyTorch
  processes          Python processes of their own, also with the library of another checkout
  timing             contestants that take turns
  tables, reports    numbers as text; what is printed and stored
  command            flags and errors of a command
"""
