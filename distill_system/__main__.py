"""`python -m distill_system` is the `distill-system` command."""

from distill_system.cli import main

main()
