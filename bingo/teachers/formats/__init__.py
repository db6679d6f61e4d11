"""One file a published format of checkpoints: NAME.py is teacher.format NAME, and nothing else names it (bingo/teachers/contract.py)."""
