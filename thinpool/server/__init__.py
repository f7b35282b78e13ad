"""The server of a pool and its client."""
