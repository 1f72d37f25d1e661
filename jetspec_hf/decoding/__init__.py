"""Decoding: `generate` with a draft head."""
