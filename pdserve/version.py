"""The version of this tree."""

__version__ = "0.1.0"
