"""The ranks of a run, and the signals and requests that reach them."""
