"""fuse, unfuse and explain: other people's models on fused layers."""
