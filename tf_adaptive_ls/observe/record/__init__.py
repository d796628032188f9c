"""The record of a run: a file of lines, what is written to it, and what is read from it."""
