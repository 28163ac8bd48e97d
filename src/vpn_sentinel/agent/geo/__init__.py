"""Offline databases of places: the folder they are kept in, fetching them, and looking addresses up."""
