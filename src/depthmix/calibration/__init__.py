"""Confidence that means what it says: one temperature, fitted on rows that were held out."""
