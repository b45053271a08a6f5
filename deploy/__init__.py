"""Everything that puts the parts together: the command line and the local supervisor. May import all."""
