"""HALP: training with low-bit offsets from a moving center (De Sa et al. 2018)."""
