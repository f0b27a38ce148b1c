"""One physical layout a file: where the bytes of a logical matrix lie, as a bijection with its inverse."""
