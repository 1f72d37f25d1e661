"""Draft trees: how they are built, what their nodes may see, and what a target accepts of them."""
