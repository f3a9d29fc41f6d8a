"""Hand-written speed for CPUs: ``accelerate.py`` puts it into a model; see there."""
