"""`python -m bingo.cli` runs the command `bingo`."""

from bingo.cli.main import main

main()
