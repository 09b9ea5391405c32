"""What every backend may import: the validated problem and what it is made of."""
