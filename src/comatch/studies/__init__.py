"""Studies: many runs that differ in a few settings, their seeds, and what follows from them."""
