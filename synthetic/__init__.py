"""Training clips without footage of real people: portraits and speech become animated puppets."""
