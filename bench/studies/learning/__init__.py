"""Networks trained on real data: what the studies that do so share.

data.py reads the images, run.py says what is trained, ways.py how it is run; recipe.py trains it,
row.py is what is kept, command.py goes through the trainings.
"""
