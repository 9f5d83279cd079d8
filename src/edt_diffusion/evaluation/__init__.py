"""Judging generated pictures."""
