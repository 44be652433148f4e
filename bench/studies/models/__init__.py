"""`resfuse study models`: do fuse and build_engine answer as other people's networks do, and how
fast are they beside other runtimes?"""
