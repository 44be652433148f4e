"""What is computed: convolution problems, activations, folded batch norms, tolerances."""
