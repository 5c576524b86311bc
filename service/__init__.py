"""The online path: a request in, weights of exactly that size out."""
