"""Compares finished runs of several objectives and seeds: means, error bars, significance."""
