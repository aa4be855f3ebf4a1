"""The ranks of a run, their signals, leases, and connection to the launcher."""
