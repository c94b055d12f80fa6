"""Plugins for other tools. Each module imports its tool, and is imported by name in that tool's settings only."""
