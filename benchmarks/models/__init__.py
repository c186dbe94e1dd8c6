"""Models of other libraries beside the same ones by hand, and beside their own samplers."""
