"""Where a run's processes are (`ranks`) and what takes an optimizer step (`engine`)."""
