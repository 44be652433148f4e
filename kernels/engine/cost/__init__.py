"""Lower bounds for the time of parts of a network, on this device or on any GPU."""
