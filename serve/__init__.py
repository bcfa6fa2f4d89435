"""Bundle -> RPC."""
