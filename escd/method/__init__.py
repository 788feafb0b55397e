"""The method, in the paper's order: encoder (stage 1), fusion (stage 2), tuning (stage 3)."""
