"""What shows and records gradients and scales; `calibrate` alone sets any."""
