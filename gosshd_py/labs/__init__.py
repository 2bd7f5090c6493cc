"""Exercises: one promise broken on purpose, in a server of its own, and how it shows in the trace."""
