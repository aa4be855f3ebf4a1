"""Run directories, checkpoints, and weights on disk or at a URL."""
