"""Physics quantities to model inputs and back."""
