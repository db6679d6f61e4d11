"""`python -m bingo.cli`: the command bingo."""

from bingo.cli.main import main

main()
