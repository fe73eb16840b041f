"""Files that hold a run: what is in them, how they are written and read."""
