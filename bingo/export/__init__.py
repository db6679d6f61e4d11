"""A trained backbone in the formats of other libraries: one file for each, to_NAME.py, found by its name."""
