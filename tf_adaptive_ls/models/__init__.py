"""Whole models: what they call, under which plan they run, wrapping and stripping them."""
