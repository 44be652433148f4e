"""Convolutions of few output tiles, their reduction split over multiprocessors."""
