"""Generating text with a model, scoring it, and searching for the best."""
