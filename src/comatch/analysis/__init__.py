"""Is the bottleneck real, what do the compression tokens hold, and how it looks."""
