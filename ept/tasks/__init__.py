"""Kinds of tasks and the paper's thirteen."""
