"""The only room that knows signals: those that end a run, and what loader workers make of them. See docs/signals.md."""
