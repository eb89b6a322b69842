"""The fast twins of the root's definitions: packed layers and kernels. `choose_fast` is the one way in."""
