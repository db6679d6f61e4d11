"""One file a method: bingo/methods/NAME.py holds `build`; its section of params.yaml is in bingo/params/methods.py."""
