"""Load options, and the memory plan that is computed before anything is allocated."""
