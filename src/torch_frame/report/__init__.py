"""Pictures of what a run has logged."""
