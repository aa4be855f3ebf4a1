"""What commands do around a run: plan, measure, inspect, convert."""
