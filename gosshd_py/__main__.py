"""`python -m gosshd_py` is `gosshd`."""

from .cli import main

main()
