"""Many trainings as one: planned, packed onto cores, GPUs or a Ray cluster, and continued after a stop."""
