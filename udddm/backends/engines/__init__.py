"""Engines: what turns losses into optimizer steps."""
