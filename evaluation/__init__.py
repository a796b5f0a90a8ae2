"""Observables, distances, physics metrics and plots."""
