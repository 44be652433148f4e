"""What was measured on this machine before: times, and configurations that were wrong."""
