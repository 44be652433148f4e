"""Any convolution with its epilogue: an implicit GEMM, or depthwise."""
