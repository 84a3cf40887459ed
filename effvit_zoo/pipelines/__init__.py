"""Trainings of several stages, each of them a run of the one engine."""
