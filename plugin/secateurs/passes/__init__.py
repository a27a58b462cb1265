"""The built-in passes and the base classes of every pass."""
