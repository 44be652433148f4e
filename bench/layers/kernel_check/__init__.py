"""`resfuse check`: is every configuration of every kernel right on this device?"""
