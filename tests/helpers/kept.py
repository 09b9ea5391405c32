"""Functions for the tests of Numba's disk cache, which keeps only those that lie in a file."""


def add(x, y):
    return x + y


def multiply(x, y):
    return x * y
