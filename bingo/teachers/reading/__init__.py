"""Reading of checkpoints of any program: their content without wrappers, and the networks built from them."""
