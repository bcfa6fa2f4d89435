"""Dataset -> checkpoint."""
