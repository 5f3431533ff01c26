"""One optimizer step: batches, teacher, objective, update."""
