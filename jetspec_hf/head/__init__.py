"""A draft head: its configuration, its layers, and how to load it. Travels to the Hub."""
