"""Facts about backbones, and how they are loaded."""
