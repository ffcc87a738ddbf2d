"""Real labelled text and the pretrained models that read it, out of PyPI packages."""
