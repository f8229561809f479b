"""The machinery of the book: execute chapters, gather their claims, build the site."""
