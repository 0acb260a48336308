"""The API of the Muset AI research platform."""

from importlib.metadata import version

__version__ = version("muset")
