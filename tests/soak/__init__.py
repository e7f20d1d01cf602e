"""The long form of "nothing grows": a cluster over etcd under load, whose workers come and go a thousand times.

Run with `make soak`. Manager, proxy, etcd and one worker of each role stay; guests, real workers of both roles with
real engines and UCX, register, serve, and are drained or killed. `nursery` is where guests are born, `churn` lets them
come and go, `load` asks, `sampling` watches, `__main__` judges.
"""
