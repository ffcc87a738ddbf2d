"""The update of the hidden states in a layer, step 8 of docs/method.md."""

from .api import layer_update

__all__ = ["layer_update"]
