"""Studies: the same training of several models, with several seeds, and what it shows."""
