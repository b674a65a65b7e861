"""What a run's layers and router do, as one page, pictures and tables."""
