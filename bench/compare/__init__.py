"""`resfuse compare`: is B slower than A, and can one tell?"""
