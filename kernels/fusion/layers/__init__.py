"""What runs in place of a chain of layers, and the folded weights it keeps."""
