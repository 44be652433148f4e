"""The engine as a backend of torch.compile; see compile_backend.py."""
