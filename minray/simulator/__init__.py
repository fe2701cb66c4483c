"""`minray simulate`: many nodes in virtual time, driven by the node's own code.

world.py is the cluster, costs.py what things cost, workloads.py what is run, report.py how it is shown.
"""
