"""One file a method: bingo/methods/NAME.py holds `build`, bingo/methods/NAME_params.py its section of params.yaml."""
