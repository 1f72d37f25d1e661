"""Verification: what a target says of the nodes of a tree."""
