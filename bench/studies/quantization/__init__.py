"""What trained networks lose in int8, by calibration method and by tool.

subjects.py says which networks and images, tools.py quantises, answer_changes.py compares,
quantization_study.py goes through them and appends rows.
"""
