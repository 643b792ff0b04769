"""Readers and metrics of samples, each with its source."""
