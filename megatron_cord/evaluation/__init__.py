"""Evaluation: question sets, answers from both views, scores, intervals, and the pages that show them."""
