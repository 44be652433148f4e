"""1x1 convolutions with their epilogue: one GEMM."""
