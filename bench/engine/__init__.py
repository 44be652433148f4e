"""`resfuse engine`, `resfuse roofline`: one network's plan, and the least time it can take."""
