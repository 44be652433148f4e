"""What lies between the convolutions of a quantised network: conversions, pools and means."""
