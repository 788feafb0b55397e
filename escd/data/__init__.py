"""The labelled shape x appearance world, and a person's own images."""
