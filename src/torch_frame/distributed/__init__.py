"""The only package, with hooks and trainers, that knows of more than one process."""
