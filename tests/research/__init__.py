"""Hand-written models that already are GRAPE, as research code writes them, with counted sites and known meaning."""
