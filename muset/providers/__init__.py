"""Sources of answers."""
