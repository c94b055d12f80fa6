"""The command line `rlora`."""

from .app import app, main


__all__ = ["app", "main"]
