"""What is measured and how it is written down: cases, samples, metrics, rows."""
