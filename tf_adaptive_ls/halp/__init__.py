"""HALP: training with offsets of few bits from a center that moves (De Sa et al. 2018)."""
