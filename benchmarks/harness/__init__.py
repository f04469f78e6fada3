"""How benchmarks are run, kept fair, compared and shown."""
