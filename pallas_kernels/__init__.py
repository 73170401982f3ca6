"""Hand-written kernels for the decode loop. Importing this package imports no Pallas: each `attend` does that."""
