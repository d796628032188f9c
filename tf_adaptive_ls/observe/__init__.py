"""What shows and records gradients: reads, and never steers."""
