"""How good samples are: Frechet distance, KID, Inception Score, precision and recall, in any feature space."""
