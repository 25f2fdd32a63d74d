"""Targets a rewritten program can be handed to. Each target is a package of its own in this folder."""
