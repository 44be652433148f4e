"""Networks trained on real data: what the studies that do so share.

data.py reads the images, training_run.py says what is trained, variants.py how it is run; recipe.py
trains it, training_row.py is what is kept, training_session.py goes through the trainings.
"""
