"""`resfuse study degradation`: the result that residual networks were made for, measured again.

He et al. 2015 (arXiv:1512.03385), figure 6: as plain networks get deeper their training error goes
up, which no overfitting explains; that of residual networks does not. data.py reads the images,
recipe.py trains one network, run.py says which, row.py what is kept, command.py goes through them.
"""
