"""Scoring with lm-eval: tasks for local files, generators and the harness's own data."""
