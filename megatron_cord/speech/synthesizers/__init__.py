"""Synthesizers: one protocol, and espeak-ng, Piper, Kokoro and OpenAI-compatible endpoints behind it."""
