"""Evaluation: question sets, answers from text and from audio, scores, intervals, and the pages that show them."""
