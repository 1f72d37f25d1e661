"""Files: what commands read and write, and what they must not write over."""
