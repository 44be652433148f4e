"""Calibration for int8: the ranges of a network's values, found on images."""
