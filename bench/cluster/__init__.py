"""`resfuse sweep`: the cases of a sweep as jobs of a cluster, through submitit.

Each job measures a shard of the cases into a results folder of its own, one subprocess a case as
always. Only the process that waits for the jobs writes the shared folder, so nothing rests on
locks, which network file systems keep at their leisure. A job that was preempted goes on after the
last row of its own folder.
"""
