"""The machine: memory, energy, clocks, ceilings, and whether it is idle."""
