"""Spoken question sets: text made speakable, synthesizers, recordings to shards. Training never imports it."""
