"""Bundle + files -> files."""
