"""What the kernels compile to, for GPUs that need not be here."""
