"""`resfuse study training`: does a network that is trained fused learn as it does unfused?

The same networks from the same seeds, on the same images in the same order, each run in several
ways (learning/ways.py). Rounding alone makes two trainings part after some dozen steps, whatever
computed them; so the answer is in how fast they part, beside eager and float64, and in whether the
curves stay among those of other seeds.
"""
