"""`python -m jetspec_hf`: the command `jetspec`, for launchers that want a module."""

from .cli import main

main()
