"""What can be seen of a run while it goes on: metrics, trackers, alerts, log-prob mismatch, rollout dump, watchdog."""
