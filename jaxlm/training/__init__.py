"""The training step, the loop around it, and exact evaluation."""
