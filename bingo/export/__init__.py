"""Export of a trained backbone to the formats of other libraries. Each format is a file to_NAME.py, found by its name."""
