"""Training on several processes, started by torchrun: the first leads, the others follow.

Each process of torchrun (a parent) goes through the same cases and measures each in a subprocess of
its own, as a single process does; the subprocesses of a case form a process group. Parents talk
through a key-value store alone, so that nothing one case breaks reaches the next.
"""
