"""What several runs over the same records cost together: composition, selection among them, a registry."""
