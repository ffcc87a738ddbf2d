"""Rows of text and labels, from files and from the hub."""
