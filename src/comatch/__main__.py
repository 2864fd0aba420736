"""`python -m comatch`, and so `torchrun -m comatch train ...`, is the command line."""

from comatch.cli import main

main()
