"""The protocol: references, prompts, scores, judges, and the study that runs them."""
