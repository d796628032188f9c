"""The record of a run: its file, its writers, and its reader."""
