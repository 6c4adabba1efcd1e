"""Continuing, scoring and searching texts with a trained model."""
