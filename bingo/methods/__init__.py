"""Each method is one file bingo/methods/NAME.py with a function `build`; its section of params.yaml is defined in
bingo/params/methods.py."""
