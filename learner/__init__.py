"""From feedback to a better adapter. May import feedback and serving."""
