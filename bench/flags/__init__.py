"""The flags of every command: `add_<command>(parser)`, in files by what the commands are about.

No torch is imported here, so that `--help` answers at once.
"""
