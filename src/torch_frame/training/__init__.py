"""How the weights change: losses, update, precision, schedules, EMA."""
