"""What the late layers, and the router over them, do on held-out rows."""
