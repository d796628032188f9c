"""Arrays in, arrays out: formats, taps, reports, rules and the update of all scales."""
