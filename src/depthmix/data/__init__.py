"""Rows for training and evaluation: read, checked, and put into one template's prompts."""
