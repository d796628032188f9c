"""Tables, records and pictures of gradients and scales; only `calibrate` sets scales."""
