"""Sample quality metrics: Frechet distance, KID, Inception Score, precision and recall, in any feature space."""
