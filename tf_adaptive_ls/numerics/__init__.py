"""Formats, taps, reports, rules, and the update of all scales: functions of arrays."""
