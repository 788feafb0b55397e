"""Stored results as the paper's numbers, tables and figures."""
