"""The edgeward command."""
