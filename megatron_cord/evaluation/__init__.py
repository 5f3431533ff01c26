"""How well a model reads and hears: question sets, answers, scores, intervals, and the pages that show them."""
