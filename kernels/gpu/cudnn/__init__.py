"""cuDNN's convolution + ReLU through torch: which form is right and fastest here."""
