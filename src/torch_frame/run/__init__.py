"""What one run needs around the loop. Nothing here takes a Trainer: parts, values and callbacks."""
