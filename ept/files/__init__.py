"""The files of an adapter."""
