"""Where a run's processes come from (launchers) and what takes its optimizer steps (engines)."""
