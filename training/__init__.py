"""Scripts for `accelerate launch`, and the collators and callbacks they share."""
