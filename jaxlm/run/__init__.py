"""A training run on disk."""
