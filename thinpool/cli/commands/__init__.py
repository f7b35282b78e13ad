"""The commands, a module per subject; each has ``COMMANDS``, by name."""
