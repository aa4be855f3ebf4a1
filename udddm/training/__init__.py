"""The training loop: inputs, steps, progress reports, and one rank's part of a run."""
