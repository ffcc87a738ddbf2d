"""Whole training steps, inference and decoding: EPT beside the bare backbone and its peers, and their memory."""
