"""Showing that long work goes on: a bar on a terminal or in a notebook, plain lines elsewhere.

All of it goes to stderr, and nothing is shown for work that ends within two seconds, so that
standard output stays the result's alone.
"""
