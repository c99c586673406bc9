"""An attack on runs, files and inputs: nothing may be silently wrong, nothing lost, every error a sentence.

  python -m benchmarks.attack                                 all parts, 20 minutes on two cores
  python -m benchmarks.attack --only=kills --num=5 --seed=1   five kills with another seed

Parts:

  kills      experiments that are killed (SIGKILL, every fifth by Ctrl-C) at a random moment and resumed
  races      two or three experiments in one output folder, or with one folder of networks
  full_disk  experiments that cannot write files beyond a random size, resumed with room to write
  results    damaged copies of `results.json`
  networks   damaged copies of a trained network's folder
  inputs     malformed inputs of the library's public functions

Each trial has one `Outcome`. The table goes into docs/reliability.md when all parts run in full.
"""
