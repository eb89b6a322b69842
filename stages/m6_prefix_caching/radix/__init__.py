"""A second index: a tree, which also finds a beginning that ends inside a block."""
