"""Small numerical pieces that every method shares: masked sums, KL estimators, token statistics without logits."""
