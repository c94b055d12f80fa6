"""Connections to other programs, each in a module that these import; none is needed by the rest of the package."""
