"""How samples become batches on the device: their order, their seeds, their way there."""
