"""``python -m serve`` is the command ``halve``."""

from serve.cli import main

main()
