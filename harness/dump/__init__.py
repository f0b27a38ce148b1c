"""Somebody's incident as a case: what FlashInfer's flight recorder (FLASHINFER_LOGLEVEL=10) wrote before a call."""
