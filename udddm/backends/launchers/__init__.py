"""Launchers: what starts the processes of a run."""
