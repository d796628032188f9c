"""Whole models: tracing and planning their calls, wrapping and stripping them."""
