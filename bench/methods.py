"""The methods that are compared, as `bench` calls them; they live in `ept.peers`."""

from ept.peers import METHODS, build

__all__ = ["METHODS", "build"]
