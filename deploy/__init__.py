"""Ways to run Tandem."""
