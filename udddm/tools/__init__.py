"""The work of the commands around a run: plan, measure, inspect, convert."""
