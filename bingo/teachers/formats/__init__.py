"""Published checkpoint formats: each is a file NAME.py for teacher.format NAME and needs no registration (see
bingo/teachers/contract.py)."""
