"""Reading of checkpoints of any code: their content, wrappers taken off, and the networks made from them."""
