"""`resfuse study degradation`: the result that residual networks were made for, measured again.

He et al. 2015 (arXiv:1512.03385), figure 6: as plain networks get deeper their training error goes
up, which no overfitting explains; that of residual networks does not. plan.py says what is trained,
row.py what is kept; the rest is shared with other studies (learning/).
"""
