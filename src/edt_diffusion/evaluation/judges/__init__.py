"""Classifiers of pictures, one kind per file."""
