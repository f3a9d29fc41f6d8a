"""Finished runs as tables, intervals and pictures."""
