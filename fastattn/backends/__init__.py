"""The implementations, one module each; `fastattn.dispatch` lists them."""
