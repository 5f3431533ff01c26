"""From sequences to microbatches: how many go where, and how their tokens lie in the model's input."""
