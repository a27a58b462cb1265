"""An example of a plugin for Secateurs: the pass `drop-last-block`."""
