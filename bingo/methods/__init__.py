"""Each method is one file bingo/methods/NAME.py, in which `build` is its class; bingo/params/methods.py defines its section of
params.yaml."""
