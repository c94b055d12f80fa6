"""
Entry points that other programs load at their start, in a separate package.

Importing `rlora_trl` imports PEFT, which takes seconds. Programs load their plugins in each of their processes, so a
plugin imports the library only where the user has turned it on.
"""
