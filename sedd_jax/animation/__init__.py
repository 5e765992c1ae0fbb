"""How a text comes about, for people to look at: in the terminal, as a page, as a GIF."""
