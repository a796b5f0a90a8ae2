"""A transformers-compatible model zoo for particle and nuclear physics."""
