"""What all Triton kernels share: launches, argument checks, epilogues, gradients."""
