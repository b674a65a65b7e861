"""Tuning from cached depth: what frozen layers compute is read from disk instead."""
