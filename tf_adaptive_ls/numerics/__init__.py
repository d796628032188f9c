"""Arrays in, arrays out: knows no layer and no model."""
