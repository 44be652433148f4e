"""`resfuse study training`: does a network that is trained fused learn as it does unfused?

The same networks from the same seeds, on the same images in the same order, each run in several
ways (learning/ways.py). Rounding alone makes two trainings part after some dozen steps, whatever
computed them; so the answer is in how fast a way parts from float64, beside eager, and in whether
its curve is closer to eager's of the same seed than another seed's is.
"""
