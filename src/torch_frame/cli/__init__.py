"""The `torch-frame` command."""
