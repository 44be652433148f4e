"""Convolutions of quantised values: int8 products, int32 sums, float32 epilogue."""
