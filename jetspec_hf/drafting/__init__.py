"""Drafting: from hidden states to a tree."""
