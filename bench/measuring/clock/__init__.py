"""The only clock of measurements, and the rule when to stop."""
