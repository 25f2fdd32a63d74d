"""Programs drawn from a grammar of position encodings: models with known truth, and near misses with known falsity."""
