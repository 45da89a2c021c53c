"""Pure array maths, no models: masks, log-probabilities, KL estimators, advantages, losses."""
