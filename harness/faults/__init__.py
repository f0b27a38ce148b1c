"""Planted defects: wrong layers computed from the reference, and what the acceptance rules in use say of them."""
