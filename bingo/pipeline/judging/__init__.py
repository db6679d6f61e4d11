"""The networks that are evaluated, and their evaluation on labelled images: the parts of pipeline that can change a result."""
