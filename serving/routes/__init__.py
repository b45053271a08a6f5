"""One module per group of routes; each holds short functions whose dependencies have names."""
