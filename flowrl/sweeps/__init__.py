"""Many trainings as one: planned, packed onto cores, GPUs or a Ray cluster, and gone on with after a stop."""
