"""A frozen transformers model behind an EPT layer."""
