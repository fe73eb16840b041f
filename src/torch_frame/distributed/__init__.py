"""Which process this is, and what its training does together with the others. Imports torch only."""
